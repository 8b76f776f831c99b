"""A failure on one rank alone, between two exchanges of a law or a recording, fails all.

Each test shows afterwards that the ranks are in step: none was left waiting.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import LawError, RecordingError
from pytest_dcp.faults.crashes import recording
from pytest_dcp.properties import (
    Layout,
    MeshSpec,
    StateSpec,
    TensorSpec,
    WithStorage,
    assert_idempotent_save,
    assert_inplace,
    assert_meta_load,
    assert_overwrite_atomic,
    assert_partial_load,
    assert_round_trip,
    assert_training_resumes,
    subworlds,
)
from pytest_dcp.properties.whole import whole

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld
    from pytest_dcp.faults import FaultyStorage

pytestmark = pytest.mark.world_size(2, timeout=60, isolation="module")
SHARDED = StateSpec({"w": TensorSpec((4,))}).on(Layout(MeshSpec((2,)), (Shard(0),)))


@pytest.fixture(autouse=True)
def in_step_at_the_end(world: RankWorld) -> Iterator[None]:
    yield
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    world.barrier()


class FailsOnRank1:
    """As `SHARDED`, but the `nth` call of one method fails on rank 1."""

    world_size = 2
    meshes = SHARDED.meshes

    def __init__(self, method: str, nth: int = 1) -> None:
        self.method = method
        self.left = nth

    def state(self, device: str | None = None) -> dict[str, Any]:
        self._called("state")
        return SHARDED.state(device)

    def full(self) -> dict[str, Any]:
        self._called("full")
        return SHARDED.full()

    def _called(self, method: str) -> None:
        self.left -= method == self.method
        if self.left == 0 and method == self.method and dist.get_rank() == 1:
            raise OSError(f"no {method} here")


Law = Callable[[Any, Path], None]
LAWS: list[tuple[str, Law]] = [
    ("saved", lambda bad, folder: assert_round_trip(bad, SHARDED, folder)),
    ("loaded", lambda bad, folder: assert_round_trip(SHARDED, bad, folder)),
    ("meta", lambda bad, folder: assert_meta_load(SHARDED, bad, folder)),
    ("in place", lambda bad, folder: assert_inplace(SHARDED, bad, folder)),
    ("partial", lambda bad, folder: assert_partial_load(SHARDED, bad, {"w"}, folder)),
    ("idempotent", lambda bad, folder: assert_idempotent_save(bad, folder)),
    ("atomic", lambda bad, folder: assert_overwrite_atomic(SHARDED, bad, folder, budget=5)),
]


CALLS = [("state", 1), ("full", 1)]


@pytest.mark.parametrize(
    ("law", "method", "nth"),
    [
        *(pytest.param(law, *call, id=f"{name}-{call[0]}") for name, law in LAWS for call in CALLS),
        *(
            pytest.param(LAWS[5][1], "state", nth, id=f"idempotent-state-{nth}")
            for nth in (2, 3, 4)
        ),
    ],
)
def test_a_state_that_cannot_be_made_on_one_rank(
    checkpoint_dir: Path, law: Law, method: str, nth: int
) -> None:
    with pytest.raises(LawError, match=f"OSError: no {method} here"):
        law(FailsOnRank1(method, nth), checkpoint_dir)


class Training:
    """A run whose step fails on rank 1 at the given place."""

    def __init__(self, fails_in: str) -> None:
        self.fails_in = fails_in
        self.tensors = SHARDED.state()

    def train(self, first: int, last: int) -> None:
        self._step(f"train {first}")
        dist.all_reduce(torch.ones(1))

    def state(self) -> dict[str, Any]:
        self._step("state")
        return self.tensors

    def take(self, state: dict[str, Any]) -> None:
        self._step("take")

    def _step(self, name: str) -> None:
        if name == self.fails_in and dist.get_rank() == 1:
            raise OSError(f"no {name} here")


class Trained:
    world_size = 2
    meshes = SHARDED.meshes

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in = fails_in

    def start(self, *, fresh: bool) -> Training:
        if self.fails_in == "start" and dist.get_rank() == 1:
            raise OSError("no start here")
        return Training(self.fails_in)


@pytest.mark.parametrize(
    ("which", "step"),
    [
        ("saved", "start"),
        ("saved", "state"),
        ("loaded", "start"),
        ("loaded", "state"),
        ("loaded", "take"),
    ],
)
def test_a_training_that_fails_on_one_rank(checkpoint_dir: Path, step: str, which: str) -> None:
    runs = {"saved": Trained(), "loaded": Trained(), which: Trained(step)}
    with pytest.raises(LawError, match=f"OSError: no {step} here"):
        assert_training_resumes(runs["saved"], runs["loaded"], checkpoint_dir, exact=True)


def test_a_part_of_a_state_that_one_rank_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> object:
        raise OSError("no places here")

    if dist.get_rank() == 1:
        monkeypatch.setattr("pytest_dcp.properties.whole.places_of", broken)
    with pytest.raises((LawError, OSError), match="no places here"):
        whole(SHARDED.state(), 2)


# Storages.


def storage(make: Callable[[], object], half: str) -> WithStorage:
    def fails(path: str | os.PathLike[str]) -> Any:
        if dist.get_rank() == 1:
            make()
        return own[half](path)

    own: dict[str, Any] = {"writer": dcp.FileSystemWriter, "reader": dcp.FileSystemReader}
    return WithStorage(**{**own, half: fails})


def refuse() -> object:
    raise OSError("no storage here")


@pytest.mark.parametrize("half", ["writer", "reader"])
def test_a_storage_that_cannot_be_made_on_one_rank(checkpoint_dir: Path, half: str) -> None:
    with pytest.raises(LawError, match="OSError: no storage here"):
        assert_round_trip(SHARDED, SHARDED, checkpoint_dir, dcp=storage(refuse, half))


def test_a_storage_that_skips_on_every_rank_skips_the_test(checkpoint_dir: Path) -> None:
    def skips(path: object) -> Any:
        pytest.skip("no server")

    skipping = WithStorage(skips, dcp.FileSystemReader)
    with pytest.raises(pytest.skip.Exception, match="no server"):
        assert_round_trip(SHARDED, SHARDED, checkpoint_dir, dcp=skipping)


def test_a_storage_that_skips_on_one_rank_is_no_skip(checkpoint_dir: Path) -> None:
    skips = storage(lambda: pytest.skip("no server"), "writer")
    with pytest.raises(LawError, match="making the writer: rank 1: Skipped: no server"):
        assert_round_trip(SHARDED, SHARDED, checkpoint_dir, dcp=skips)


# Folders.


def test_a_shared_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(OSError, match="No space left on device"):
        subworlds.shared_folder()


def test_a_folder_that_one_rank_cannot_make(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        if dist.get_rank() == 1:
            patched.setattr(Path, "mkdir", denied)
        with pytest.raises(LawError, match="not yours"):
            assert_overwrite_atomic(None, SHARDED, checkpoint_dir / "new", budget=5)


# Recordings.


def unseen(folder: Path) -> None:
    """Write a file as no Python code does."""
    subprocess.run(["/bin/sh", "-c", 'echo unseen > "$0"', folder / "unseen"], check=True)


def test_an_error_that_only_the_leader_finds_fails_every_rank(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, rank: int
) -> None:
    work = unseen if rank == 1 else Path
    with pytest.raises(RecordingError, match="'unseen' was recorded as missing"):  # noqa: SIM117
        with faulty_storage.record():
            work(checkpoint_dir)


class WritesUnseen:
    """An engine that writes behind Python's back."""

    def save(self, state: dict[str, Any], **keywords: Any) -> None:
        dcp.save(state, **keywords)
        unseen(Path(keywords["checkpoint_id"]))

    def load(self, state: dict[str, Any], **keywords: Any) -> None:
        dcp.load(state, **keywords)


def test_a_recording_of_a_law_that_is_not_whole_fails_every_rank(checkpoint_dir: Path) -> None:
    with pytest.raises(RecordingError, match="unseen"):
        assert_overwrite_atomic(None, SHARDED, checkpoint_dir, budget=5, dcp=WritesUnseen())


@pytest.mark.parametrize("method", ["append", "__init__", "close"])
def test_a_log_that_one_rank_cannot_write(
    faulty_storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch, rank: int, method: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the log is full")

    if rank == 1:
        monkeypatch.setattr(recording.Log, method, fails)
    with pytest.raises((OSError, RecordingError), match="the log is full"):  # noqa: SIM117
        with faulty_storage.record():
            pass


@pytest.mark.parametrize("function", ["read_tree", "_read"])
def test_an_error_of_one_rank_reading_a_recording_reaches_all(
    faulty_storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch, rank: int, function: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError("nothing to read")

    if rank == (1 if function == "_read" else 0):
        monkeypatch.setattr(recording, function, fails)
    with pytest.raises((OSError, RecordingError), match="nothing to read"):  # noqa: SIM117
        with faulty_storage.record():
            pass
