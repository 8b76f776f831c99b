"""Recording: what every rank does to the watched folders, until a block ends or the rank dies.

Each rank appends its operations to a file of its own as they are done, so that those of a rank
that was killed are there too. When the block has ended in every rank that lives, all read all
files. In a world both ends of the block are meetings of all ranks.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pytest_dcp.errors import RecordingError
from pytest_dcp.faults.crashes.disk_model import DiskModel, Rules
from pytest_dcp.faults.crashes.enumerate import in_order
from pytest_dcp.faults.crashes.folder_trees import read_tree
from pytest_dcp.faults.crashes.trace import Trace, Tree, TreeLink
from pytest_dcp.faults.tap import Watcher, watch_operations
from pytest_dcp.faults.tap.operation import Operation

Meet = Callable[[str, bytes], Sequence[bytes | None]]
"""Waits for all ranks; what each brought, None for one that died because the test asked for it."""


@dataclass(frozen=True, slots=True)
class Desk:
    """Where the ranks of a world put what they record, and how they meet."""

    place: Path
    """A folder that every rank sees and none watches."""
    rank: int = 0
    meet: Meet = field(default=lambda what, brought: (brought,))
    announce_failure: Callable[[BaseException | None], AbstractContextManager[None]] = field(
        default=lambda error: nullcontext()
    )
    """Around a meeting at which this rank tells its peers of an error."""

    def agree(self, what: str, step: Callable[[], bytes]) -> Sequence[bytes | None]:
        """What `step` returned in each rank, None for one that has died. Collective.

        Each rank tells the others whether its step failed before any goes on: what it raised is
        raised there, and RecordingError in the others.
        """
        failed: Exception | None = None
        try:
            brought = OK + step()
        except Exception as error:  # noqa: BLE001 - raised again below
            failed = error
            text = f"rank {self.rank}: {type(error).__name__}: {error}"
            # What is wrong with a recording is no rank's own affair: all say the same.
            brought = FAILED + (str(error) if isinstance(error, RecordingError) else text).encode()
        with self.announce_failure(failed):
            came = self.meet(what, brought)
        if failed is not None:
            raise failed
        for said in came:
            if said is not None and said.startswith(FAILED):
                raise RecordingError(said.removeprefix(FAILED).decode())
        return [None if said is None else said.removeprefix(OK) for said in came]


OK, FAILED = b"+", b"-"


class RecordedPlace(Protocol):
    """What is recorded: folders, wherever they are."""

    def trees(self) -> list[Tree]:
        """What is in each folder now."""

    def watching(self, watcher: Watcher, rank: int) -> AbstractContextManager[None]:
        """Let the watcher see what is done there, until the block ends."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders of this machine."""

    roots: Sequence[Path]

    def trees(self) -> list[Tree]:
        """What is in each folder now."""
        return [read_tree(root) for root in self.roots]

    def watching(self, watcher: Watcher, rank: int) -> AbstractContextManager[None]:
        """Let the watcher see what is done there, until the block ends."""
        return watch_operations(self.roots, watcher, rank=rank, observing=True)


class Log:
    """Watches, and appends what is done to a file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def before(self, operation: Operation) -> None:
        """Nothing: it only looks."""

    def after(self, operation: Operation) -> None:
        """Append the operation."""
        self.append(operation)

    def append(self, entry: Operation | int) -> None:
        """Append an operation, or the time at which the block ended, by one write."""
        data = pickle.dumps(entry)
        done = os.write(self._fd, data)
        if done != len(data):
            raise RecordingError(f"only {done} of {len(data)} bytes of a record could be written")

    def close(self) -> None:
        """Let the file go."""
        os.close(self._fd)


class Recorded:
    """What was recorded: full when the block has ended."""

    def __init__(self) -> None:
        self._trace: Trace | None = None

    @property
    def trace(self) -> Trace:
        """The trace. Raises RecordingError while the block goes on."""
        if self._trace is None:
            raise RecordingError(
                "nothing is recorded yet: look at the trace when the block of record() has ended "
                "without an exception"
            )
        return self._trace

    def end(self, trace: Trace) -> None:
        """Give it what was recorded."""
        self._trace = trace


@contextmanager
def recording(place: RecordedPlace, desk: Desk, into: Recorded) -> Iterator[None]:
    """Record what is done to a place. Collective where the desk's ranks are several.

    Raises RecordingError at the end when the folders do not hold what the recorded operations make.
    """
    with ExitStack() as clean_up:
        folder, leads = _begin(place, desk, clean_up)
        yield from _record(place, desk, into, folder, leads=leads)


def _record(
    place: RecordedPlace, desk: Desk, into: Recorded, folder: Path, *, leads: bool
) -> Iterator[None]:
    found: list[Trace] = []
    with ExitStack() as stack:
        logs: list[Log] = []

        def begin() -> bytes:
            logs.append(log := Log(folder / f"rank-{desk.rank}"))
            stack.callback(log.close)
            stack.enter_context(place.watching(log, desk.rank))
            return b""

        def end() -> bytes:
            with stack.pop_all():
                logs[0].append(time.monotonic_ns())
            return b""

        desk.agree("record(): it is ready", begin)
        yield
        alive = desk.agree("record(): it ends", end)

    def read() -> bytes:
        bases: Sequence[Tree] = pickle.loads((folder / "base").read_bytes())
        found.append(_read(bases, folder))
        if leads and None not in alive:
            # What a killed rank did last may be missing in its file.
            check(found[0], place.trees())
        return b""

    desk.agree("record(): it is read", read)
    into.end(found[0])


def _begin(place: RecordedPlace, desk: Desk, clean_up: ExitStack) -> tuple[Path, bool]:
    """A folder for this recording, with what the place holds; and whether this rank leads.

    `clean_up` removes the folder in the process that made it, however the recording ends.
    """
    came = desk.meet("record(): it begins", b"here")
    leader = next(rank for rank, brought in enumerate(came) if brought)
    leads = leader == (desk.rank if len(came) > 1 else 0)

    def make() -> bytes:
        if not leads:
            return b""
        desk.place.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix="recording-", dir=desk.place)
        # Errors are ignored: after a failure other ranks may still write there.
        clean_up.callback(shutil.rmtree, made, ignore_errors=True)
        Path(made, "base").write_bytes(pickle.dumps(place.trees()))
        return os.fsencode(made)

    brought = desk.agree("record(): the folder as it was", make)[leader]
    if brought is None:
        raise RecordingError(f"rank {leader} died before it could tell what the folder holds")
    return Path(os.fsdecode(brought)), leads


def _read(bases: Sequence[Tree], folder: Path) -> Trace:
    operations: list[Operation] = []
    returned: dict[int, int] = {}
    for file in sorted(folder.glob("rank-*")):
        for entry in _entries(file):
            if isinstance(entry, Operation):
                operations.append(entry)
            else:
                returned[int(file.name.removeprefix("rank-"))] = entry
    return Trace.of(bases, operations, returned)


def _entries(path: Path) -> Iterator[Operation | int]:
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                return  # the end, or where a killed rank stopped


def check(trace: Trace, found: Sequence[Tree]) -> None:
    """Raise RecordingError unless the whole trace makes what was found."""
    machine = DiskModel.of(trace.base, Rules())
    impossible = in_order(machine, trace.operations, range(len(trace.operations)))
    if impossible:
        raise RecordingError(f"{trace.operations[impossible[0]]} could not be replayed: {UNSEEN}")
    made, there = machine.seen(), Trace.of(found, (), {}).base
    wrong = list(_differences(made, there))
    if wrong:
        raise RecordingError(f"{'; '.join(wrong[:10])}: {UNSEEN}")


UNSEEN = (
    "something was done that Python does not see (by mmap, a C extension, another process, or a "
    "function of os that was bound to a name before the recording): write through Python, or "
    "record less"
)


def _differences(made: Mapping[str, object], there: Mapping[str, object]) -> Iterator[str]:
    for path in sorted(made.keys() | there.keys()):
        one, other = made.get(path, AbsentEntry), there.get(path, AbsentEntry)
        if one != other:
            yield f"{path!r} was recorded as {_describe(one)} and is {_describe(other)}"


class AbsentEntry:
    """Stands for an entry that is not there."""


def _describe(entry: object) -> str:
    if isinstance(entry, bytes):
        return f"a file of {len(entry)} bytes"
    if isinstance(entry, TreeLink):
        return f"a link to {entry.target!r}"
    return "a folder" if entry is None else "missing"
