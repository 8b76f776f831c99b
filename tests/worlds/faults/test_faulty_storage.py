"""The fixture around anything: torch's engine, plain code, stores without files, damage at rest."""

from __future__ import annotations

import errno
import importlib
import io
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import FaultError, StoreResponseError
from pytest_dcp.faults import (
    BitFlip,
    Errno,
    Fault,
    FaultyStorage,
    Foreign,
    Hang,
    InputOutput,
    Missing,
    NoSpace,
    PartialListing,
    PreconditionFailed,
    Raise,
    ShortWrite,
    Slow,
    StaleListing,
    Swap,
    TornWrite,
    Truncate,
    Unavailable,
    WrongShape,
    WrongType,
    ZeroSector,
)

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")
"""As Any: it exports its names without saying so to a type checker."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

STATE = {"w": torch.arange(3000.0), "b": torch.ones(5, dtype=torch.int64), "epoch": 3}
CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE)


def zeros() -> dict[str, Any]:
    return {"w": torch.zeros(3000), "b": torch.zeros(5, dtype=torch.int64), "epoch": 0}


def causes(error: BaseException) -> list[BaseException]:
    """The failures of a CheckpointException, and what they were raised from."""
    found: list[BaseException] = []
    left: list[Any] = [
        failure for failure, _ in getattr(error, "failures", {0: (error, None)}).values()
    ]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found.append(one)
            left += [one.__cause__, one.__context__]
    return found


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_each_operation_of_torch_s_writer_fails_with_each_errno(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, code: int
) -> None:
    for kind in ("create", "write", "sync", "close", "rename"):
        fault = faulty_storage.inject(Errno(code), on=kind)
        with pytest.raises(CheckpointException) as caught:
            torch_dcp.save(STATE, checkpoint_id=checkpoint_dir)
        assert any(getattr(one, "errno", None) == code for one in causes(caught.value)), kind
        assert fault.fired == 1


def test_torch_s_writer_and_reader_fail_in_their_hooks(
    faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    finish = faulty_storage.inject(Raise(ValueError("no")), on="finish")
    read = faulty_storage.inject(Raise(ValueError("no"), when="future"), on="read_data")
    for _ in "two":
        writer = faulty_storage.writer(torch_dcp.FileSystemWriter(checkpoint_dir))
        if not finish.fired:
            with pytest.raises(CheckpointException, match="no"):
                torch_dcp.save(STATE, storage_writer=writer)
    torch_dcp.save(STATE, storage_writer=writer)
    reader = faulty_storage.reader(torch_dcp.FileSystemReader(checkpoint_dir))
    with pytest.raises(CheckpointException, match="no"):
        torch_dcp.load(zeros(), storage_reader=reader)
    torch_dcp.load(zeros(), storage_reader=reader)
    assert (finish.fired, read.fired) == (1, 1)
    faulty_storage.assert_loads(STATE, load=torch_dcp.load)


def test_plain_code_fails_below_a_watched_folder_and_not_outside(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, tmp_path: Path
) -> None:
    fault = faulty_storage.inject(NoSpace(after_bytes=6), on="write", sticky=True)
    with pytest.raises(OSError, match="No space left"):
        (checkpoint_dir / "a").write_bytes(b"0123456789")
    assert (checkpoint_dir / "a").read_bytes() == b"012345"
    (tmp_path / "elsewhere").write_bytes(b"0123456789")
    other = tmp_path / "other"
    other.mkdir()
    faulty_storage.watch(other)
    with pytest.raises(OSError, match="No space left"):
        (other / "b").write_bytes(b"0123456789")
    assert fault.fired >= 2


def test_worker_threads_are_distinguished_from_the_main_one(
    faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    faulty_storage.inject(InputOutput(), on="create", thread="worker")
    named = faulty_storage.inject(InputOutput(), on="create", thread="up*", nth=2)
    failed: list[BaseException] = []

    def write() -> None:
        for n in range(2):
            try:
                (checkpoint_dir / f"x{n}").touch()
            except OSError as error:
                failed.append(error)

    (checkpoint_dir / "main").touch()
    thread = threading.Thread(target=write, name="uploader")
    thread.start()
    thread.join()
    assert len(failed) == 2
    assert named.fired == 1


@pytest.mark.parametrize(
    "fault",
    [BitFlip(-700, 3), ZeroSector(1), Truncate(), Truncate(-1), Missing(), Foreign(), Swap(".m*")],
    ids=repr,
)
@pytest.mark.parametrize("on", ["read_data", "write_data"])
def test_damage_of_a_data_file_is_never_loaded_silently(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, fault: Fault, on: str
) -> None:
    if on == "write_data" and isinstance(fault, Swap):
        dcp.save(STATE, checkpoint_id=checkpoint_dir)  # so that there is what to swap with
    damage = faulty_storage.inject(fault, on=on, path="*.distcp")
    try:
        dcp.save(STATE, storage_writer=faulty_storage.writer(dcp.FileSystemWriter(checkpoint_dir)))
    except CheckpointException:
        assert on == "write_data"
        assert damage.fired == 1
        return
    target = zeros()
    reader = faulty_storage.reader(dcp.FileSystemReader(checkpoint_dir, verify="full"))
    with pytest.raises(CheckpointException):
        dcp.load(target, storage_reader=reader)
    assert damage.fired == 1


def test_a_hang_is_released_by_hand_and_a_slow_operation_by_itself(
    faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    dcp.save(STATE, checkpoint_id=checkpoint_dir)
    hung = faulty_storage.inject(Hang(), on="rename", thread="worker")
    faulty_storage.inject(Slow(0.01), on="create")
    new = STATE | {"epoch": 4}
    saving = threading.Thread(target=lambda: dcp.save(new, checkpoint_id=checkpoint_dir))
    saving.start()
    hung.wait_until_fired()
    faulty_storage.assert_loads(STATE)
    hung.release()
    saving.join()
    faulty_storage.assert_loads(new)


def test_an_unreleased_hang_ends_and_is_reported(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, tmp_path: Path
) -> None:
    with FaultyStorage(checkpoint_dir, tmp_path / "counts") as storage:
        storage.inject(Hang(limit_s=0.01), on="create")
        with pytest.raises(TimeoutError, match="no rank released"):
            (checkpoint_dir / "x").touch()
        with pytest.raises(FaultError, match=r"call release\(\)"):
            storage.check()


WRONG_HOOKS = ("save_planner.create_global_plan", "writer.prepare_global_plan", "write_data")


@pytest.mark.parametrize(
    ("hook", "wrong"),
    [
        pytest.param(hook, wrong, id=f"{hook}-{wrong!r}")
        for hook in WRONG_HOOKS
        for wrong in (WrongType(), WrongType("what"), WrongShape())
    ],
)
def test_a_hook_that_gives_the_wrong_thing_makes_no_checkpoint(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, hook: str, wrong: Fault
) -> None:
    faulty_storage.inject(wrong, on=hook)
    with pytest.raises(CheckpointException):
        dcp.save(
            STATE,
            storage_writer=faulty_storage.writer(dcp.FileSystemWriter(checkpoint_dir)),
            planner=faulty_storage.planner(dcp.DefaultSavePlanner()),
        )
    assert not (checkpoint_dir / ".metadata").exists()


def test_listings_are_partial_or_stale(faulty_storage: FaultyStorage, checkpoint_dir: Path) -> None:
    for name in ("a.x", "b.x", "c.y"):
        (checkpoint_dir / name).touch()
    faulty_storage.inject(PartialListing("*.x"), on="list")
    assert os.listdir(checkpoint_dir) == ["c.y"]
    faulty_storage.inject(StaleListing(), on="list", sticky=True)
    (checkpoint_dir / "new").touch()
    assert sorted(os.listdir(checkpoint_dir)) == ["a.x", "b.x", "c.y"]
    with os.scandir(checkpoint_dir) as entries:
        assert sorted(entry.name for entry in entries) == ["a.x", "b.x", "c.y"]


class Memory(FileSystemBase):
    """A store that is no folder: objects that are there once they are closed."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        stream = io.BytesIO(b"" if "w" in mode else self.objects[str(path)])
        yield stream
        if "w" in mode:
            self.objects[str(path)] = stream.getvalue()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        self.objects[str(new_path)] = self.objects.pop(str(path))

    def init_path(self, path: Any) -> str:
        return str(path)

    def mkdir(self, path: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return any(name == path or name.startswith(f"{path}/") for name in self.objects)

    def rm_file(self, path: Any) -> None:
        del self.objects[str(path)]

    def ls(self, path: Any) -> list[str]:
        return [name for name in self.objects if name.startswith(f"{path}/")]


def stored(faulty_storage: FaultyStorage, memory: Memory) -> tuple[Any, Callable[..., Any]]:
    """A writer to the store, and a loader from it, both through the faulty file system."""
    fs = faulty_storage.filesystem(memory)
    writer, reader = dcp.FileSystemWriter("x"), dcp.FileSystemReader("x")
    writer.fs, writer.path = fs, "mem://run/1"
    reader.fs, reader.path = fs, "mem://run/1"
    return writer, lambda state, **_: dcp.load(state, storage_reader=reader)


@pytest.mark.parametrize(
    ("fault", "on", "path"),
    [
        (Unavailable(), "write", "*.distcp"),
        (Unavailable(), "create", ".metadata*"),
        (PreconditionFailed(), "rename", ".metadata"),
        (PreconditionFailed(), "finish", None),
        (NoSpace(after_bytes=100), "write_data", "mem:*/1/*.distcp"),
        (InputOutput(), "close", "*.distcp"),
        (TornWrite(), "write", "*.distcp"),
    ],
    ids=repr,
)
def test_a_store_without_files_fails_in_every_operation(
    faulty_storage: FaultyStorage, fault: Fault, on: str, path: str | None
) -> None:
    memory = Memory()
    writer, load = stored(faulty_storage, memory)
    dcp.save(STATE, storage_writer=writer)
    injected = faulty_storage.inject(fault, on=on, path=path)
    with pytest.raises(CheckpointException) as caught:
        dcp.save(STATE | {"epoch": 4}, storage_writer=faulty_storage.writer(writer))
    assert any(isinstance(one, OSError | StoreResponseError) for one in causes(caught.value))
    assert injected.fired == 1
    faulty_storage.assert_loads(STATE, load=load)


def test_a_store_takes_its_writes_in_parts_and_lists_late(faulty_storage: FaultyStorage) -> None:
    memory = Memory()
    writer, load = stored(faulty_storage, memory)
    faulty_storage.inject(ShortWrite(), on="write", sticky=True)
    dcp.save(STATE, storage_writer=writer)
    faulty_storage.assert_loads(STATE, load=load)
    fs = faulty_storage.filesystem(memory)
    faulty_storage.inject(StaleListing(), on="list", nth=2)
    shown = fs.ls("mem://run/1")
    memory.objects["mem://run/1/new"] = b""
    assert fs.ls("mem://run/1") == shown
    assert fs.ls("mem://run/1") == [*shown, "mem://run/1/new"]


def test_the_end_of_the_test_reports_faults_that_never_fired(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    with FaultyStorage(checkpoint_dir, tmp_path / "counts") as storage:
        storage.inject(NoSpace(), on="write_data", rank=3)
        storage.inject(NoSpace(), on="sync", must_fire=False)
        with pytest.raises(FaultError) as caught:
            storage.check()
    assert "NoSpace(after_bytes=None), on='write_data', rank=3" in str(caught.value)
    assert "on='sync'" not in str(caught.value)
    assert os.open.__module__ != "pytest_dcp.faults.tap.os_calls"


def test_a_failed_assertion_of_content_names_the_difference(
    faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    dcp.save({"model": {"w": torch.ones(2, 3)}, "e": 1}, checkpoint_id=checkpoint_dir)
    faulty_storage.assert_loads({"model": {"w": torch.ones(2, 3)}, "e": 1})
    wrong = torch.ones(2, 3)
    wrong[1, 2] = 5
    with pytest.raises(AssertionError) as caught:
        faulty_storage.assert_loads({"model": {"w": wrong}, "e": 2})
    assert "model.w: 1 of 6 elements differ, the first at (1, 2)" in str(caught.value)
    assert "e: 2 expected, got 1" in str(caught.value)
