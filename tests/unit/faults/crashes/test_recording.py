"""Recording and restoring: the trace of a block, its check against the folder, its crash states."""

from __future__ import annotations

import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemBase

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import RecordingError
from pytest_dcp.faults import CrashState, FaultyStorage, Kill, LyingSync, recorded
from pytest_dcp.faults.crashes.crash_state import Recording, Search
from pytest_dcp.faults.crashes.folder_trees import read_tree, restore_tree, write_tree
from pytest_dcp.faults.crashes.recording import Desk, Folders, recording
from pytest_dcp.faults.crashes.trace import Tree, TreeLink


def commit(folder: Path) -> None:
    """Write a file as a careful program does."""
    with (folder / "t").open("wb") as file:
        file.write(b"new")
        file.flush()
        os.fsync(file.fileno())
    (folder / "t").replace(folder / "f")
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def old(folder: Path) -> None:
    (folder / "f").write_bytes(b"old")


TREE: Tree = {"d": None, "d/e": None, "d/f": b"x" * 5000, "g": b"", "s": TreeLink("d/f"), "z": None}


def test_a_tree_comes_back_from_a_folder(tmp_path: Path) -> None:
    write_tree(TREE, tmp_path)
    assert read_tree(tmp_path) == TREE
    assert read_tree(tmp_path / "missing") == {}
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is neither"):
        read_tree(tmp_path)


def test_a_restored_folder_is_gone_after_the_block() -> None:
    with restore_tree(TREE) as folder:
        assert read_tree(folder) == TREE
        (folder / "more").touch()
    assert not folder.exists()


def test_a_block_gives_its_operations_and_states(
    faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    old(checkpoint_dir)
    with faulty_storage.record() as trace:
        commit(checkpoint_dir)
    assert [op.kind for op in trace.operations] == [
        "create", "write", "sync", "close", "rename", "open", "sync_folder", "close",
    ]  # fmt: skip
    states = list(trace.crash_states("kill"))
    assert [state.files for state in states if state.returned] == [{"f": b"new"}]
    assert {"f": b"old", "t": b"ne"} in [state.files for state in states]
    for state in states:
        with state.restored() as folder:
            assert {p.name: p.read_bytes() for p in folder.iterdir()} == state.files
        assert str(state) == state.id
        assert state.id.startswith("kill-")
        assert state.id in repr(state)
        assert state.what in repr(state)


def test_nothing_can_be_asked_before_the_block_has_ended(faulty_storage: FaultyStorage) -> None:
    with faulty_storage.record() as trace, pytest.raises(RecordingError, match="block"):
        list(trace.crash_states())
    with pytest.raises(KeyError), faulty_storage.record() as trace:
        raise KeyError
    with pytest.raises(RecordingError, match="without an exception"):
        _ = trace.operations


def test_states_of_an_empty_recording_are_refused(
    faulty_storage: FaultyStorage, tmp_path: Path
) -> None:
    """The block wrote elsewhere."""
    with faulty_storage.record() as trace:
        (tmp_path / "elsewhere").write_text("x")
    assert trace.operations == ()
    with pytest.raises(RecordingError, match=r"nothing was recorded: .*watch\(folder\) adds"):
        trace.crash_states()


def behind(folder: Path, mapped: type[mmap.mmap] = mmap.mmap) -> None:
    with (folder / "f").open("r+b") as file, mapped(file.fileno(), 0) as view:
        view[0:1] = b"X"


def unseen_removal(folder: Path, unlink: Callable[[Any], None] = os.unlink) -> None:
    unlink(folder / "f")


@pytest.mark.parametrize("unseen", [behind, unseen_removal])
def test_changes_that_python_does_not_see_are_named(unseen: Callable[[Path], None]) -> None:
    with pytest.raises(RecordingError, match=r"'f' was recorded as a file of 3 bytes"):
        recorded(unseen, old)


class Unreadable(Folders):
    """Folders that cannot be read."""

    def trees(self) -> list[Tree]:
        raise PermissionError("no entry")


def fail() -> None:
    raise ZeroDivisionError("in the block")


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [
        (Folders, fail, ZeroDivisionError),
        (Unreadable, fail, PermissionError),
        (Folders, lambda: None, None),
    ],
)
def test_nothing_of_a_recording_is_left_however_it_ends(
    tmp_path: Path,
    kind: type[Folders],
    body: Callable[[], None],
    error: type[Exception] | None,
) -> None:
    watched, place = tmp_path / "watched", tmp_path / "place"
    watched.mkdir()
    raises = pytest.raises(error) if error else nullcontext()
    with raises, recording(kind([watched]), Desk(place), Recording()):
        body()
    assert list(place.iterdir()) == []


def test_a_name_without_origin_is_an_error(tmp_path: Path) -> None:
    from pytest_dcp.faults.tap import os_calls as calls

    def workload(folder: Path) -> None:
        calls.real.mkdir(folder / "d")
        (folder / "d" / "f").touch()

    with pytest.raises(RecordingError, match=r"create d/f .* could not be replayed"):
        recorded(workload)


def test_threads_that_write_beside_each_other_are_replayed() -> None:
    def workload(folder: Path) -> None:
        def some(n: int) -> None:
            for m in range(8):
                (folder / f"{n}").mkdir(exist_ok=True)
                (folder / f"{n}" / f"{m}").write_bytes(bytes(n))
                if m % 3 == 0:
                    (folder / f"{n}" / f"{m}").rename(folder / f"{n}-{m}")

        threads = [threading.Thread(target=some, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    trace = recorded(workload)
    states = list(trace.crash_states("posix", budget=200))
    assert len(states) == 200


def test_a_lie_of_the_storage_shows_in_the_folder_after_a_crash(
    faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    """The recording shows the operations that reached the storage, not the results the program
    saw."""
    old(checkpoint_dir)
    faulty_storage.inject(LyingSync(), on="sync", sticky=True)
    with faulty_storage.record() as trace:
        commit(checkpoint_dir)
    assert "sync" not in [op.kind for op in trace.operations]
    after = [state.files for state in trace.crash_states("posix") if state.returned]
    assert {"f": b""} in after


def test_budgets_and_ids_reach_the_states(tmp_path: Path) -> None:
    trace = recorded(commit, old)
    everything = list(trace.crash_states())
    assert len(list(trace.crash_states(budget=3))) == 3
    assert len(list(trace.crash_states(budget="nightly"))) == len(everything)
    trace._search = Search(replay=everything[5].id, folder=tmp_path / "one")
    assert [state.id for state in trace.crash_states()] == [everything[5].id]
    assert trace.crash_states("s3") == []
    assert trace._search.has_replayed() is True
    trace._search = Search(replay="s3-0123456789", folder=tmp_path / "none")
    assert trace._search.has_replayed() is None
    assert trace.crash_states("s3") == trace.crash_states("posix") == []
    assert trace._search.has_replayed() is False
    trace._search = Search()
    for wrong in ("many", 0, -1):
        with pytest.raises(ValueError, match="pr, nightly or a number"):
            list(trace.crash_states(budget=wrong))


@pytest.mark.parametrize("state", recorded(commit, old).crash_states(budget=6), ids=str)
def test_states_can_parametrise_a_test(state: CrashState) -> None:
    with state.restored() as folder:
        assert (folder / "f").read_bytes() in (b"old", b"new")


def test_states_can_be_subtests(subtests: pytest.Subtests) -> None:
    for state in recorded(commit, old).crash_states("nfs"):
        with subtests.test(state.id), state.restored() as folder:
            assert (folder / "f").read_bytes() in (b"old", b"new")


@pytest.mark.world_size(2)
def test_every_ranks_operations_are_in_the_trace_of_each(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, rank: int
) -> None:
    for _ in range(2):
        with faulty_storage.record() as trace:
            (checkpoint_dir / f"f{rank}").write_bytes(b"x")
        assert {(op.rank, op.path) for op in trace.operations} == {(0, "f0"), (1, "f1")}
        finals = [state.files for state in trace.crash_states("kill") if len(state.returned) == 2]
        assert finals == [{"f0": b"x", "f1": b"x"}]


@pytest.mark.world_size(3)
@pytest.mark.parametrize("killed", [0, 2])
def test_a_rank_that_was_killed_is_in_the_trace_too(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, rank: int, killed: int
) -> None:
    faulty_storage.inject(Kill(), on="write", rank=killed, nth=2)
    with faulty_storage.record() as trace:
        for n in range(3):
            (checkpoint_dir / f"f{rank}-{n}").write_bytes(b"x")
    mine = [op.kind for op in trace.operations if op.rank == killed]
    assert mine == ["create", "write", "close", "create"]
    alive = {0, 1, 2} - {killed}
    assert {rank for state in trace.crash_states("kill") for rank in state.returned} == alive


@pytest.fixture(autouse=True)
def _nothing_left_in_memory() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert not {name for name in set(os.listdir("/dev/shm")) - before if str(os.getpid()) in name}


class Memory(FileSystemBase):
    """Files in memory, put when they are closed, as an object store does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        stream = io.BytesIO(b"" if "w" in mode else self.files[str(path)])
        yield stream
        if "w" in mode:
            self.files[str(path)] = stream.getvalue()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        self.files[str(new_path)] = self.files.pop(str(path))

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        pass

    def exists(self, path: Any) -> bool:
        return any(file == str(path) or file.startswith(f"{path}/") for file in self.files)

    def rm_file(self, path: Any) -> None:
        del self.files[str(path)]

    def ls(self, path: Any) -> list[str]:
        return [file for file in self.files if file.startswith(f"{path}/")]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_save_to_an_object_store_is_whole_after_any_crash(faulty_storage: FaultyStorage) -> None:
    def save(fill: float) -> None:
        writer = dcp.FileSystemWriter("memory://run")
        writer.fs, writer.path = store, "memory://run"
        dcp.save({"w": torch.full((3,), float(fill))}, storage_writer=writer)

    store = faulty_storage.filesystem(Memory())
    save(1)
    with faulty_storage.record(store, "memory://run") as trace:
        save(2)
    kinds = [op.kind for op in trace.operations]
    assert kinds.count("rename") == 1
    assert "sync" not in kinds
    outcomes = [
        faulty_storage.assert_loads_one_of(
            state, {"w": torch.ones(3)}, {"w": torch.full((3,), 2.0)}
        )
        for state in trace.crash_states("s3")
    ]
    assert set(outcomes) == {"old", "new"}
    assert outcomes[-1] == "new"
