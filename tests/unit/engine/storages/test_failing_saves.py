"""Saves that fail, meet another save or lose a rank raise an error that says so, and lose nothing.

For crashes see tests/worlds/faults/test_crash_states.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import local_disk
from pytest_dcp._engine.io.disk import Buffer, In, Out
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.write_files import FileJob
from pytest_dcp._engine.storages import local_filesystem as file_system
from pytest_dcp.checkpoint.filesystem import FileSystemWriter
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageWriter
from pytest_dcp.errors import CheckpointReplacedError
from pytest_dcp.tracebacks import owner_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

Files = dict[str, bytes]


def files_in(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(fill: float) -> dict[str, Any]:
    return {
        "w": torch.full((40, 50), fill, dtype=torch.float32),
        "b": torch.full((7,), fill, dtype=torch.float64),
        "empty": torch.zeros(0),
        "epoch": int(fill),
    }


def loaded(folder: Path) -> float:
    """Which save the folder holds. Raises unless it is one save's, whole."""
    target = state(0)
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    fill = float(target["epoch"])
    expected = state(fill)
    for name in ("w", "b", "empty"):
        assert torch.equal(target[name], expected[name]), name
    return fill


def test_ranks_on_their_own_can_save_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    dcp.save(state(1), checkpoint_id=tmp_path)
    (tmp_path / ".metadata").write_bytes(b"damaged")
    dcp.save(state(2), checkpoint_id=tmp_path, use_collectives=False)
    assert loaded(tmp_path) == 2


@pytest.mark.parametrize(
    "together",
    [
        pytest.param(
            True,
        ),
        False,
    ],
)
def test_overwrite_false_protects_checkpoints_of_either_kind(
    tmp_path: Path, *, together: bool
) -> None:
    dcp.save(state(1), checkpoint_id=tmp_path, use_collectives=not together)
    before = files_in(tmp_path)
    writer = FileSystemWriter(tmp_path, overwrite=False)
    with pytest.raises(dcp.CheckpointException, match="exists"):
        dcp.save(state(2), storage_writer=writer, use_collectives=together)
    assert files_in(tmp_path) == before


@pytest.mark.world_size(2)
def test_ranks_on_their_own_never_load_a_mix(checkpoint_dir: Path, rank: int) -> None:
    """Rank 1's part of the second save fails after rank 0's is committed: old, new or an error."""

    class Failing(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if rank == 1:
                until = time.monotonic() + 5
                while committed.read_bytes() == first and time.monotonic() < until:
                    time.sleep(0.01)
                raise OSError("no room")
            return super().write_data(plan, planner)

    dcp.save({"w": torch.full((3,), 1.0)}, checkpoint_id=checkpoint_dir, use_collectives=False)
    committed = checkpoint_dir / "__0.metadata"
    first = committed.read_bytes()
    dist.barrier()
    with pytest.raises(dcp.CheckpointException):
        dcp.save(
            {"w": torch.full((3,), 2.0)},
            storage_writer=Failing(checkpoint_dir),
            use_collectives=False,
        )
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    found: list[float] = [0.0, 0.0]
    dist.all_gather_object(found, float(target["w"][0]))
    assert found == [1.0, 1.0]


# ---- a disk that fails, and saves that meet


class FailingDisk(LocalDisk):
    """Raises at the n-th operation of a kind, once."""

    def __init__(self, kind: str, number: int = 0) -> None:
        self.kind = kind
        self.left = number
        self.failed = False
        self.lock = threading.Lock()

    def may_fail(self, kind: str) -> None:
        with self.lock:
            if kind == self.kind and not self.failed:
                self.left -= 1
                if self.left < 0:
                    self.failed = True
                    raise OSError(errno.ENOSPC, f"no room for {kind}")

    @contextmanager
    def create(self, folder: Path, name: str) -> Iterator[Out]:
        self.may_fail("create")
        with super().create(folder, name) as out:
            yield FailingOut(out, self)

    def replace(self, folder: Path, old: str, new: str) -> None:
        self.may_fail("replace")
        super().replace(folder, old, new)

    def remove(self, folder: Path, name: str) -> None:
        self.may_fail("remove")
        super().remove(folder, name)

    def sync_folder(self, folder: Path) -> None:
        self.may_fail("sync_folder")
        super().sync_folder(folder)


class FailingOut:
    """A new file of a failing disk."""

    def __init__(self, out: Out, disk: FailingDisk) -> None:
        self.out = out
        self.disk = disk

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.disk.may_fail("write")
        self.out.write(buffers)

    def reserve(self, nbytes: int) -> None:
        self.disk.may_fail("reserve")
        self.out.reserve(nbytes)

    def begin_sync(self) -> None:
        self.out.begin_sync()

    def end_at(self, nbytes: int) -> None:
        self.out.end_at(nbytes)

    def sync(self) -> None:
        self.disk.may_fail("sync")
        self.out.sync()


BEFORE_COMMIT = [
    ("create", 0), ("create", 1), ("create", 4), ("write", 0), ("write", 1), ("write", 4),
    ("sync", 0), ("sync", 1), ("sync", 4), ("sync_folder", 0), ("replace", 0), ("reserve", 1),
]  # fmt: skip
AFTER_COMMIT = [("sync_folder", 1), ("remove", 0)]


def fills(tensor: torch.Tensor) -> list[float]:
    """The different values of a tensor."""
    return sorted(set(tensor.tolist()))


def failed_save(folder: Path, disk: FailingDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_system, "disk_of", lambda fs: disk)
    writer = FileSystemWriter(folder, thread_count=4)
    with pytest.raises(dcp.CheckpointException, match="no room for"):
        dcp.save(state(2), storage_writer=writer)
    assert disk.failed
    monkeypatch.undo()


@pytest.mark.parametrize(("kind", "number"), BEFORE_COMMIT)
def test_a_save_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    dcp.save(state(1), checkpoint_id=tmp_path)
    threads = threading.active_count()
    failed_save(tmp_path, FailingDisk(kind, number), monkeypatch)
    assert threading.active_count() == threads
    assert loaded(tmp_path) == 1
    dcp.save(state(3), checkpoint_id=tmp_path)
    assert loaded(tmp_path) == 3
    assert len(files_in(tmp_path)) == 2


@pytest.mark.parametrize(("kind", "number"), [("write", 1), ("sync", 4), ("replace", 0)])
def test_a_save_that_fails_takes_its_files_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    """On a full disk they would keep every later save from having room."""
    dcp.save(state(1), checkpoint_id=tmp_path)
    before = files_in(tmp_path)
    failed_save(tmp_path, FailingDisk(kind, number), monkeypatch)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("kind", "number"), AFTER_COMMIT)
def test_a_save_that_raises_has_not_replaced_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    dcp.save(state(1), checkpoint_id=tmp_path)
    disk = FailingDisk(kind, number)
    monkeypatch.setattr(file_system, "disk_of", lambda fs: disk)
    try:
        dcp.save(state(2), checkpoint_id=tmp_path)
    except dcp.CheckpointException as error:
        # The second sync of the folder: the save says that it stands, and may not last.
        expected = 2 if "is in place" in str(error) else 1
    else:
        expected = 2
    monkeypatch.undo()
    assert loaded(tmp_path) == expected


@pytest.mark.parametrize(
    "meet",
    [
        "create",
        "write",
        pytest.param(
            "replace",
        ),
        pytest.param(
            "after replace",
        ),
    ],
)
def test_two_saves_at_once_leave_one_of_them_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet: str
) -> None:
    """The whole second save happens inside an operation of the first."""
    inner: list[float] = []
    refused: list[str] = []
    succeeded: set[float] = set()
    monkeypatch.setattr(local_disk, "LOCK_S", 0.1)

    def other() -> None:
        if not inner:
            inner.append(3)
            try:
                dcp.save(state(3), checkpoint_id=tmp_path)
                succeeded.add(3.0)
            except dcp.CheckpointException as error:
                refused.append(str(error))

    class Meeting(FailingDisk):
        def may_fail(self, kind: str) -> None:
            if kind == meet:
                other()

        def replace(self, folder: Path, old: str, new: str) -> None:
            super().replace(folder, old, new)
            if not inner and meet == "after replace":
                other()

    dcp.save(state(1), checkpoint_id=tmp_path)
    disk = Meeting("")
    monkeypatch.setattr(file_system, "disk_of", lambda fs: disk)
    try:
        dcp.save(state(2), checkpoint_id=tmp_path)
        succeeded.add(2.0)
    except dcp.CheckpointException as error:
        refused.append(str(error))
    monkeypatch.undo()
    assert loaded(tmp_path) in succeeded
    assert len(succeeded) + len(refused) == 2
    reasons = ("does another save write", "another save has been committing")
    assert all(any(reason in text for reason in reasons) for text in refused)


def test_metadata_that_cannot_be_read_does_not_bring_an_older_save_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save(state(1), checkpoint_id=tmp_path, use_collectives=False)
    old = files_in(tmp_path)
    dcp.save(state(2), checkpoint_id=tmp_path)
    for name, data in old.items():  # as when the save is killed before it sweeps
        (tmp_path / name).write_bytes(data)

    class Flaky(LocalDisk):
        @contextmanager
        def open(self, folder: Path, name: str) -> Iterator[In]:
            if name == ".metadata":
                raise OSError(errno.EIO, "cannot be read now")
            with super().open(folder, name) as file:
                yield file

    monkeypatch.setattr(file_system, "disk_of", lambda fs: Flaky())
    with pytest.raises(dcp.CheckpointException, match="cannot be read now"):
        loaded(tmp_path)


def test_a_reader_beside_saves_gets_whole_checkpoints(tmp_path: Path) -> None:
    """Loads in a loop while a thread saves again and again: each is one save's, whole."""
    dcp.save(state(1), checkpoint_id=tmp_path)
    failures: list[BaseException] = []

    def saves() -> None:
        try:
            for fill in range(2, 40):
                writer = FileSystemWriter(tmp_path, sync_files=False, single_file_per_rank=False)
                dcp.save(state(fill), storage_writer=writer)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    saving = threading.Thread(target=saves)
    saving.start()
    found = [1.0]
    replaced = 0
    while saving.is_alive():
        try:
            found.append(loaded(tmp_path))
        except dcp.CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            if not all(isinstance(cause, CheckpointReplacedError) for cause in causes):
                raise
            replaced += 1
    saving.join()
    assert not failures
    assert found == sorted(found)
    assert loaded(tmp_path) == 39
    assert len(found) > replaced


# ---- writers of the user's that replace steps


class OwnSteps(FileSystemWriter):
    """Overrides the naming, writing and cleanup, and fails at the end."""

    fails = True

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        assert not list(self.path.glob("*dead*")), "leftovers take the room of this save"
        return plans

    def write_data(self, plan: Any, planner: Any) -> Any:
        job = FileJob("mine.bin", range(len(plan.items)), 0)
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._write_jobs(self._registering_folder(), [job], plan.items, planner))
        return future

    def finish(self, metadata: Any, results: Any) -> None:
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().finish(metadata, results)


def test_files_of_a_writer_that_replaces_steps_are_removed_too(tmp_path: Path) -> None:
    (tmp_path / "__0_0-dead0123.distcp").write_bytes(b"of a save that was killed")
    for _ in range(2):
        with pytest.raises(dcp.CheckpointException, match="No space left"):
            dcp.save(state(1), storage_writer=OwnSteps(tmp_path))
        assert files_in(tmp_path) == {}
    writer = OwnSteps(tmp_path)
    writer.fails = False
    dcp.save(state(1), storage_writer=writer)
    assert sorted(files_in(tmp_path)) == [".metadata", "mine.bin"]


def test_a_file_that_the_old_checkpoint_has_is_not_removed(tmp_path: Path) -> None:
    writer = OwnSteps(tmp_path)
    writer.fails = False
    dcp.save(state(1), storage_writer=writer)
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        dcp.save(state(2), storage_writer=OwnSteps(tmp_path))
    assert sorted(files_in(tmp_path)) == [".metadata", "mine.bin"]


# ---- ranks that fail


class Sabotage(FileSystemWriter):
    """Does something to one rank in the middle of its writing."""

    def __init__(self, path: Path, act: Callable[[], None]) -> None:
        super().__init__(path, thread_count=2)
        self.act = act

    def write_data(self, plan: Any, planner: Any) -> Any:
        super().write_data(plan, planner)
        self.act()
        return super().write_data(plan, planner)


class Unpicklable(Exception):
    """Holds a lock, which cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("cannot travel")
        self.lock = threading.Lock()


def of_rank(rank: int, fill: float) -> dict[str, Any]:
    return {f"mine {rank}": torch.full((1000,), fill), "both": torch.full((50,), fill)}


@pytest.mark.world_size(3)
@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_that_cannot_be_pickled_reaches_all_and_changes_nothing(
    checkpoint_dir: Path, rank: int, failing: int
) -> None:
    dcp.save(of_rank(rank, 1.0), checkpoint_id=checkpoint_dir)

    def act() -> None:
        if rank == failing:
            raise Unpicklable

    started = time.monotonic()
    with pytest.raises(dcp.CheckpointException, match="cannot travel") as caught:
        dcp.save(of_rank(rank, 2.0), storage_writer=Sabotage(checkpoint_dir, act))
    assert failing in caught.value.failures
    assert time.monotonic() - started < 5
    target = of_rank(rank, 0.0)
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert fills(target[f"mine {rank}"]) == [1.0]
    dist.barrier()
    dcp.save(of_rank(rank, 3.0), checkpoint_id=checkpoint_dir)
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert fills(target[f"mine {rank}"]) == [3.0]
    dist.barrier()
    assert len(files_in(checkpoint_dir)) == 1 + 3


@pytest.mark.world_size(3)
@pytest.mark.parametrize("failing", [0, 1])
def test_an_interrupted_rank_is_named_on_the_others(
    checkpoint_dir: Path, rank: int, failing: int
) -> None:
    dcp.save(of_rank(rank, 1.0), checkpoint_id=checkpoint_dir)

    def act() -> None:
        if rank == failing:
            raise KeyboardInterrupt

    kind = KeyboardInterrupt if rank == failing else dcp.CheckpointException
    with pytest.raises(kind) as caught:
        dcp.save(of_rank(rank, 2.0), storage_writer=Sabotage(checkpoint_dir, act))
    if rank != failing:
        assert f"rank {failing}" in str(caught.value)
        assert "KeyboardInterrupt" in str(caught.value)
    target = of_rank(rank, 0.0)
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert fills(target[f"mine {rank}"]) == [1.0]


def killed_save(folder: Path, rank: int, killed: int) -> None:
    """Save while one rank is killed; returns on the survivors only."""
    dcp.save(of_rank(rank, 1.0), checkpoint_id=folder)

    def act() -> None:
        if rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(dcp.CheckpointException, match=f"rank {killed}"):
        dcp.save(of_rank(rank, 2.0), storage_writer=Sabotage(folder, act))
    assert time.monotonic() - started < 3
    target = {"both": torch.zeros(50)}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    assert fills(target["both"]) == [1.0]
    (folder / f"survived {rank}").touch()
    time.sleep(1)


@pytest.mark.parametrize("killed", [0, 1])
def test_survivors_of_a_killed_rank_get_an_error_that_names_it(
    checkpoint_dir: Path, killed: int
) -> None:
    """The world is this test's own: its ranks are forks that meet at a file."""
    checkpoint_dir.mkdir(exist_ok=True)
    children = []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(60)
                store = FileStore(str(checkpoint_dir / "store"), 3)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
                killed_save(checkpoint_dir / "c", rank, killed)
                code = 0
            except BaseException:  # noqa: BLE001 - told by the exit code, and in the output
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert os.WTERMSIG(statuses[killed]) == signal.SIGKILL
    assert [status for rank, status in enumerate(statuses) if rank != killed] == [0, 0]


@pytest.mark.world_size(2)
def test_saves_in_the_background_beside_collectives(checkpoint_dir: Path, rank: int) -> None:
    model = torch.zeros(300_000)
    for step in range(1, 6):
        model.fill_(step)
        future = dcp.async_save(
            {"model": model, f"mine {rank}": model[:100]}, checkpoint_id=checkpoint_dir / str(step)
        )
        for _ in range(20):
            model += rank
            dist.all_reduce(model)
        assert isinstance(future, Future)
        future.result()
    for step in range(1, 6):
        target = {"model": torch.zeros(300_000), f"mine {rank}": torch.zeros(100)}
        dcp.load(target, checkpoint_id=checkpoint_dir / str(step))
        assert fills(target["model"]) == [step]
        assert fills(target[f"mine {rank}"]) == [step]


UNSAVABLE = {"v": lambda: 0}


def test_the_name_of_a_folder_that_a_failed_save_made_lasts_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "one"
    with pytest.raises(dcp.CheckpointException):
        dcp.save(UNSAVABLE, checkpoint_id=folder)
    synced: list[Path] = []
    sync = LocalDisk.sync_folder

    def noted(disk: LocalDisk, path: Path) -> None:
        synced.append(path)
        sync(disk, path)

    monkeypatch.setattr(LocalDisk, "sync_folder", noted)
    dcp.save({"v": torch.ones(2)}, checkpoint_id=folder)
    assert synced[0] == tmp_path / "runs"
    assert set(synced[1:]) == {folder}


def test_a_writer_goes_on_when_the_folder_of_its_failed_save_is_gone(tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "runs" / "one")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(UNSAVABLE, storage_writer=writer)
    shutil.rmtree(tmp_path / "runs")
    dcp.save({"v": torch.ones(2)}, storage_writer=writer, checkpoint_id=tmp_path / "two")
    assert ".metadata" in files_in(tmp_path / "two")


class Forgetful(FileSystemWriter):
    """Loses the last result on its way to the commit, as a wrong third-party storage may."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, [list(some)[:-1] for some in results])


class ForgetfulHuggingFace(HuggingFaceStorageWriter):
    """As `Forgetful`."""

    def finish(self, metadata: Metadata, results: Sequence[list[WriteResult]]) -> None:
        super().finish(metadata, [list(some)[:-1] for some in results])


@pytest.mark.parametrize("writer", [Forgetful, ForgetfulHuggingFace])
def test_a_save_that_lost_a_result_is_not_committed(
    writer: type[FileSystemWriter], tmp_path: Path
) -> None:
    good = {Forgetful: FileSystemWriter, ForgetfulHuggingFace: HuggingFaceStorageWriter}[writer]
    dcp.save({"v": torch.ones(2), "w": torch.ones(2)}, storage_writer=good(str(tmp_path)))
    before = files_in(tmp_path)
    with pytest.raises(dcp.CheckpointException, match=r"1 item\(s\).*by no rank.*'w'"):
        dcp.save({"v": torch.zeros(2), "w": torch.zeros(2)}, storage_writer=writer(str(tmp_path)))
    assert {name: files_in(tmp_path)[name] for name in before} == before


def test_a_failure_in_the_background_shows_no_frames_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saving: Any = dcp.async_save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "file" / "inside")
    with pytest.raises(NotADirectoryError) as caught:
        saving.result()
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[0] == __file__
    assert "package" not in {owner_of(file) for file in files}
    assert not saving.cancel()
