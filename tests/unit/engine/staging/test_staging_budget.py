"""With `staging_budget` a background save copies what fits, and the call waits for the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.background import async_save as background_save
from pytest_dcp._engine.io import write_files
from pytest_dcp._engine.staging.buffer_pool import Pool
from pytest_dcp._engine.staging.stager import KEPT, stage_within_budget
from pytest_dcp._engine.staging.unstaged_tensors import UnstagedTensors
from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.checkpoint.staging import release_memory
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType
from pytest_dcp.errors import CheckpointError

DEADLINE_S = 60
KIB = 1024
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(n: int = 0) -> dict[str, Any]:
    """About 50 kB: four flat tensors, a strided and an empty one, a value."""
    return {
        **{f"w{i}": torch.full((2 * KIB,), float(i + n)) for i in range(4)},
        "strided": (torch.arange(4.0 * KIB).reshape(64, 64) + n).t(),
        "empty": torch.empty(0),
        "value": {"step": n},
    }


def saved(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = dcp.load_without_template(checkpoint_id=folder)
    return loaded


def spoil(state_dict: dict[str, Any]) -> None:
    """Change every tensor, as training does once the call has returned."""
    for value in state_dict.values():
        if isinstance(value, torch.Tensor):
            value.fill_(-1.0)


def assert_saved(folder: Path, expected: dict[str, Any]) -> None:
    loaded = saved(folder)
    assert loaded.pop("value") == expected.pop("value")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [0, 10 * KIB, 30 * KIB, 1 << 30])
def test_a_save_has_the_values_at_its_call_at_any_budget(
    tmp_path: Path, budget: int, threads: int
) -> None:
    training = state(7)
    writer = dcp.FileSystemWriter(tmp_path, thread_count=threads)
    future: Any = dcp.async_save(training, storage_writer=writer, staging_budget=budget)
    spoil(training)
    future.result(DEADLINE_S)
    assert_saved(tmp_path, state(7))


def test_the_copies_are_written_after_the_call_has_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    put_rows = write_files._put_rows
    written: list[int] = []

    def put(file: Any, rows: Any, numbers: Any, request: Any) -> None:
        if written:
            assert go.wait(DEADLINE_S)
        written.append(len(numbers))
        put_rows(file, rows, numbers, request)

    monkeypatch.setattr(write_files, "_put_rows", put)
    training = state()
    future: Any = dcp.async_save(training, checkpoint_id=tmp_path, staging_budget=20 * KIB)
    assert not future.done()
    # Two of the flat tensors fit; the empty one has nothing to wait for.
    assert written == [3]
    spoil(training)
    go.set()
    future.result(DEADLINE_S)
    assert sum(written) == len(training)
    assert_saved(tmp_path, state())


def test_the_budget_is_for_all_saves_under_way(tmp_path: Path) -> None:
    release_memory()
    go = threading.Event()

    class Slow(dcp.FileSystemWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            assert go.wait(DEADLINE_S)
            super().finish(metadata, results)

    before = KEPT._leased_bytes
    first: Any = dcp.async_save(
        state(1), storage_writer=Slow(tmp_path / "1"), staging_budget=40 * KIB
    )
    held = KEPT._leased_bytes - before
    assert 0 < held <= 40 * KIB
    training = state(2)
    second: Any = dcp.async_save(training, checkpoint_id=tmp_path / "2", staging_budget=40 * KIB)
    spoil(training)
    # The first save is not over, so hardly anything was copied for the second.
    assert KEPT._leased_bytes - before <= 44 * KIB
    go.set()
    first.result(DEADLINE_S)
    second.result(DEADLINE_S)
    assert_saved(tmp_path / "1", state(1))
    assert_saved(tmp_path / "2", state(2))


def test_twenty_saves_in_a_row_take_no_more_memory_than_one(tmp_path: Path) -> None:
    release_memory()
    budget = 24 * KIB
    futures: list[Any] = []
    for n in range(20):
        training = state(n)
        futures.append(
            dcp.async_save(training, checkpoint_id=tmp_path / str(n), staging_budget=budget)
        )
        spoil(training)
        idle = sum(memory.nbytes for memory in KEPT.idle)
        assert KEPT._leased_bytes + idle <= budget
    for n, future in enumerate(futures):
        future.result(DEADLINE_S)
        assert_saved(tmp_path / str(n), state(n))


@pytest.mark.parametrize("case", ["another writer", "safetensors", "makes data"])
def test_a_writer_in_its_own_order_is_waited_for(tmp_path: Path, case: str) -> None:
    class Split(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            return super().write_data(plan, planner)

    class Doubles(dcp.DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            found = super().transform_object(write_item, object)
            return found * 1 if isinstance(found, torch.Tensor) else found

    arguments: dict[str, Any] = {"storage_writer": dcp.FileSystemWriter(tmp_path)}
    if case == "another writer":
        arguments = {"storage_writer": Split(tmp_path)}
    elif case == "safetensors":
        as_safetensors = SerializationFormat.SAFETENSORS
        arguments = {
            "storage_writer": dcp.FileSystemWriter(tmp_path, serialization_format=as_safetensors)
        }
    elif case == "makes data":
        arguments["planner"] = Doubles()
    training = {"a": torch.ones(KIB), "b": torch.ones(2, 3).t()}
    expected = {name: tensor.clone() for name, tensor in training.items()}
    future: Any = dcp.async_save(training, staging_budget=0, **arguments)
    spoil(training)
    future.result(DEADLINE_S)
    if case == "safetensors":
        from safetensors.torch import load_file

        (file,) = tmp_path.glob("__*")
        found = load_file(file)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        loaded = saved(tmp_path)
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_save_that_fails_lets_its_caller_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    future: Any = dcp.async_save(state(), checkpoint_id=tmp_path / "file" / "x", staging_budget=0)
    with pytest.raises(CheckpointException):
        future.result(DEADLINE_S)


def test_a_caller_that_was_interrupted_gets_no_checkpoint_of_changed_tensors() -> None:
    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    tensors = UnstagedTensors([torch.ones(3)])
    tensors._go_on = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tensors.wait()
    with pytest.raises(CheckpointError, match="interrupted while it waited"):
        tensors.finish_writing()


def test_an_interrupt_before_the_wait_leaves_no_checkpoint_of_changed_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, uploads = threading.Event(), list[Any]()

    class Late(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            assert changed.wait(DEADLINE_S)
            return super().write_data(plan, planner)

    def interrupt(staging: Any, upload: Any) -> Any:
        uploads.append(upload)
        raise KeyboardInterrupt

    monkeypatch.setattr(background_save._Staging, "response", interrupt)
    training = state()
    with pytest.raises(KeyboardInterrupt):
        dcp.async_save(training, storage_writer=Late(tmp_path), staging_budget=0)
    spoil(training)
    changed.set()
    with pytest.raises(CheckpointException, match="interrupted while it waited"):
        uploads[0].result(DEADLINE_S)
    assert not (tmp_path / ".metadata").exists()


def test_the_first_tensors_that_fit_are_copied() -> None:
    tensors = {
        name: torch.ones(n * KIB // 4) for name, n in zip("abcd", (4, 64, 4, 4), strict=True)
    }
    copied, left = stage_within_budget(tensors, Pool(shared=False), 9 * KIB)
    assert left is not None
    assert [left.hold(copied[name]) for name in "abcd"] == [False, True, False, True]
    assert left.nbytes == 68 * KIB
    everything, nothing_left = stage_within_budget(tensors, Pool(shared=False), 1 << 20)
    assert nothing_left is None
    assert not any(left.hold(tensor) for tensor in everything.values())


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"staging_budget": -1}, ValueError, "0 or more; got -1"),
        ({"staging_budget": 1.5}, TypeError, r"a number of bytes; got 1\.5"),
        ({"staging_budget": True}, TypeError, "a number of bytes; got True"),
        (
            {"staging_budget": 1, "async_checkpointer_type": AsyncCheckpointerType.PROCESS},
            ValueError,
            "is for saves in a thread",
        ),
        (
            {"staging_budget": 1, "async_stager": dcp.staging.DefaultStager()},
            ValueError,
            "DefaultStager stages the state in its own way",
        ),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(
    tmp_path: Path, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    call: Callable[..., Any] = dcp.async_save
    with pytest.raises(kind, match=words):
        call(state(), checkpoint_id=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
