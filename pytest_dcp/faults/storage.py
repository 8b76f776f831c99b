"""The object of the fixture `faulty_storage`: a storage that fails on command.

Enters: faults, and objects to wrap. Leaves: injections, which count how often they fired in all
ranks. Nothing is watched before the first injection. The object can be sent to ranks with a
function (`worlds`): it carries its injections along, and they act there inside `with`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from pytest_dcp.errors import FaultError
from pytest_dcp.faults.crashes.crash_state import (
    CrashState,
    Recording,
    Search,
    loads_one_of,
    recording_dir,
)
from pytest_dcp.faults.crashes.loaders import check_filled, check_signature
from pytest_dcp.faults.crashes.recording import Folders, recording
from pytest_dcp.faults.injection.filesystem import FaultyFileSystem, StoreFolder
from pytest_dcp.faults.injection.fire_counts import FireCounts
from pytest_dcp.faults.injection.hook_wrappers import Wrappers
from pytest_dcp.faults.injection.injection import Injection, problems
from pytest_dcp.faults.injection.injector import Armed, Injector, RootWatcher
from pytest_dcp.faults.kinds.base import Fault
from pytest_dcp.faults.state_differences import blank, differences, plain
from pytest_dcp.faults.tap import watch_operations

Writer = TypeVar("Writer", bound=StorageWriter)
Reader = TypeVar("Reader", bound=StorageReader)
Planner = TypeVar("Planner")
Stager = TypeVar("Stager", bound=AsyncStager)


@dataclass(frozen=True, slots=True)
class Injected:
    """Handle of an injection."""

    injection: Injection
    fire_counts: FireCounts
    must_fire: bool

    @property
    def fired(self) -> int:
        """How often it fired so far, in all ranks of the world together."""
        return sum(self.fire_counts.count_by_rank().values())

    @property
    def fired_by_rank(self) -> dict[int, int]:
        """How often it fired in each rank, without ranks in which it did not."""
        return self.fire_counts.count_by_rank()

    def release(self) -> None:
        """Let every operation that hangs at it continue, in all ranks."""
        self.fire_counts.release()

    def wait_until_fired(self, limit_s: float = 60.0) -> None:
        """Wait until it has fired in some rank. Raises FaultError after the limit."""
        self.fire_counts.await_firing(limit_s, repr(self.injection))


class FaultyStorage:
    """A storage that fails on command; see the fixture `faulty_storage`."""

    def __init__(
        self,
        checkpoint_dir: Path,
        folder: Path,
        rank: int | None = None,
        search: Search | None = None,
    ) -> None:
        """folder: where all ranks keep their counts; no rank watches it. rank: None: this process's
        rank.
        """
        self._folder = folder
        self._search = search or Search()
        self._roots = [checkpoint_dir]
        self._injected: list[Injected] = []
        self._to_arm: list[Injected] = []
        """Whether it came from another process."""
        self._rank = rank
        self._injector = Injector(this_rank() if rank is None else rank)
        self._wrappers = Wrappers(self._injector.hook)
        self._watching = ExitStack()
        self._watched: set[Path] = set()

    @property
    def checkpoint_dir(self) -> Path:
        """The folder watched from the start."""
        return self._roots[0]

    def inject(
        self,
        fault: Fault,
        *,
        on: str,
        rank: int | None = None,
        thread: str | None = None,
        path: str | None = None,
        nth: int = 1,
        sticky: bool = False,
        must_fire: bool = True,
    ) -> Injected:
        """Inject a fault from now on. Make the same injections, in the same order, in every rank.

        on: a hook ("write_data", "writer.finish", "save_planner.create_local_plan"; of wrapped
            objects), or the kind of an operation ("write", "sync", "rename", ...; below watched
            folders). A fault of operations injected at a hook acts at the operations made while
            the hook runs.
        rank: the only rank in which it acts. thread: main, worker, or a pattern of names.
        path: a pattern of the file's name, or, with a slash, of its path below the watched folder.
        nth: the first matching event of a rank at which it fires, from 1. sticky: and at every
            later one.
        must_fire: the test fails at its end if the fault never fired in any rank.

        Raises ValueError listing everything wrong with the arguments.
        """
        injection = Injection(fault, on, rank, thread, path, nth, sticky)
        wrong = problems(injection)
        if wrong:
            raise ValueError("; ".join(wrong))
        same = sum(one.injection == injection for one in self._injected)
        fire_counts = FireCounts(self._folder, f"{injection.key}-{same}")
        injected = Injected(injection, fire_counts, must_fire)
        fire_counts.begin(self._injector.rank)
        self._injected.append(injected)
        self._arm(injected)
        return injected

    def watch(self, path: str | os.PathLike[str]) -> None:
        """Let faults of operations act below this folder too."""
        self._roots.append(Path(path))
        if self._injected:
            self._begin_watching()

    def writer(self, writer: Writer) -> Writer:
        """The writer with faults at its hooks."""
        return self._wrappers.wrap(writer, "writer")

    def reader(self, reader: Reader) -> Reader:
        """The reader with faults at its hooks."""
        return self._wrappers.wrap(reader, "reader")

    def planner(self, planner: Planner) -> Planner:
        """The planner, of saves or of loads, with faults at its hooks."""
        is_load = isinstance(planner, LoadPlanner) or hasattr(planner, "commit_tensor")
        return self._wrappers.wrap(planner, "load_planner" if is_load else "save_planner")

    def stager(self, stager: Stager) -> Stager:
        """The stager with faults at its hooks."""
        return self._wrappers.wrap(stager, "stager")

    def filesystem(self, filesystem: FileSystemBase) -> FaultyFileSystem:
        """The file system with faults at its operations, even if its files are not local."""
        return FaultyFileSystem(filesystem, self._injector)

    def assert_loads(
        self,
        state: dict[str, Any],
        checkpoint_id: str | os.PathLike[str] | None = None,
        *,
        load: Callable[..., Any] | None = None,
        **keywords: Any,
    ) -> None:
        """Raise AssertionError unless the checkpoint holds this state, bit by bit. Collective.

        No fault acts meanwhile. load: a loader to use instead of `pytest_dcp.checkpoint.load`,
        called as `load(state_dict, checkpoint_id=folder, **keywords)`, to fill the state dict.
        keywords: for the loader; with `no_dist=True` a rank checks alone. The loader's exceptions
        are raised.
        """
        if load is None:
            import pytest_dcp.checkpoint

            load = pytest_dcp.checkpoint.load
        check_signature(load, keywords)
        expected = plain(state)
        actual = blank(expected)
        where = self.checkpoint_dir if checkpoint_id is None else checkpoint_id
        with self._injector.at_rest(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            check_filled(load(actual, checkpoint_id=where, **keywords), actual)
        unlike = list(differences(actual, expected))
        if unlike:
            raise AssertionError(f"{os.fspath(where)} does not hold the state: {'; '.join(unlike)}")

    @contextmanager
    def record(
        self, filesystem: FaultyFileSystem | None = None, folder: str | os.PathLike[str] = ""
    ) -> Iterator[Recording]:
        """Record the operations of all ranks below the watched folders until the block ends.
        Collective.

        filesystem, folder: instead of them, a folder of a wrapped file system that can list it
        (`ls`): an object store, or memory.

            def test_a_killed_save_leaves_the_old_state_or_the_new(checkpoint_dir, faulty_storage):
                old, new = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
                dcp.save(old, checkpoint_id=checkpoint_dir)
                with faulty_storage.record() as made:
                    dcp.save(new, checkpoint_id=checkpoint_dir)
                for state in made.crash_states("kill", budget=20):
                    faulty_storage.assert_loads_one_of(state, old, new)

        Afterwards `crash_states` of the result are the folders that a crash could have left. Raises
        RecordingError if the folders were also changed in ways that Python does not see.
        """
        result = Recording(self._search, of_watched_folders=filesystem is None)
        place = Folders(self._roots) if filesystem is None else StoreFolder(filesystem, folder)
        with recording(place, recording_dir(self._folder, self._injector.rank), result):
            yield result

    def assert_loads_one_of(
        self,
        state: CrashState,
        old: dict[str, Any] | None,
        new: dict[str, Any],
        *,
        load: Callable[..., Any] | None = None,
        **keywords: Any,
    ) -> Literal["old", "new", "nothing"]:
        """Raise AssertionError unless the crash left the complete old or new state; returns which
        one.

        Once the recorded block had ended in any rank, only the new one is accepted. old: None if
        there was no checkpoint before; then a load may also fail. load, keywords: as for
        `assert_loads`, but every rank loads alone (`no_dist=True`), and no fault acts. A loader
        that cannot be called this way, does not load the folder of the finished save, or has a bug
        is wrong itself: its exception is raised. It refuses a folder with FileNotFoundError,
        CheckpointError, or a library's exception for bytes that it cannot read.
        """
        with self._injector.at_rest():
            return loads_one_of(state, old, new, load, **keywords)

    # ---- life

    def __enter__(self) -> FaultyStorage:
        """Let the injections that it carries act until the block ends."""
        for injected in self._to_arm:
            self._arm(injected)
        self._to_arm = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop all faults, and let every operation that hangs continue."""
        self._watching.close()
        self._watched.clear()
        self._injector.disarm()
        for injected in self._injected:
            injected.release()

    def renew(self) -> None:
        """Forget every injection, in all ranks, before another example of a property."""
        self.close()
        self._injected.clear()

    def check(self) -> None:
        """Raise FaultError if an injection did not do its part in any rank."""
        wrong = [
            f"{injected.injection!r} never fired: nothing that it was to act at happened, or what "
            "has the hook was not wrapped; say must_fire=False where that is meant"
            for injected in self._injected
            if injected.must_fire and not injected.fired
        ]
        wrong += [
            f"{injected.injection!r} held something until its limit: call release() on the "
            "injection"
            for injected in self._injected
            if injected.fire_counts.is_overdue()
        ]
        if wrong:
            raise FaultError("\n".join(wrong))

    def __reduce__(self) -> tuple[Callable[..., FaultyStorage], tuple[Any, ...]]:
        return _unpickle_storage, (self._roots, self._folder, self._injected, self._search)

    def _arm(self, injected: Injected) -> None:
        injection = injected.injection
        self._wrappers.target(injection.hooks)
        names = _names_below(self._roots) if "list" in injection.kinds else {}
        self._injector.arm(Armed(injection, injected.fire_counts, names))
        self._begin_watching()

    def _begin_watching(self) -> None:
        for root in self._roots:
            real = Path(os.path.realpath(root))
            if real not in self._watched:
                self._watched.add(real)
                watcher = RootWatcher(self._injector, real)
                self._watching.enter_context(
                    watch_operations([real], watcher, rank=self._injector.rank)
                )


def _unpickle_storage(
    roots: list[Path], folder: Path, injected: list[Injected], search: Search
) -> FaultyStorage:
    """The same storage in another process, with its injections made so far."""
    storage = FaultyStorage(roots[0], folder, search=search)
    storage._roots = list(roots)
    storage._injected, storage._to_arm = list(injected), list(injected)
    return storage


def this_rank() -> int:
    """This process's rank in its world; 0 outside of one."""
    return int(os.environ.get("RANK", "0"))


def _names_below(roots: Iterable[Path]) -> dict[Path | None, frozenset[str]]:
    """The names in each of these folders and the folders below."""
    return {
        Path(folder): frozenset([*folders, *files])
        for root in roots
        for folder, folders, files in os.walk(os.path.realpath(root))
    }
