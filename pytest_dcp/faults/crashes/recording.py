"""Recording: the operations of every rank on the watched folders, until a block ends or the rank
dies.

Each rank appends its operations to its own file as they are done, so that the operations of a
killed rank are recorded too. When the block has ended in every living rank, each rank reads all
files. In a world, all ranks meet at both ends of the block.
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
"""Waits for all ranks and returns each one's value, None for a rank that the test had killed."""


@dataclass(frozen=True, slots=True)
class Desk:
    """Where the ranks of a world put their recordings, and how they meet."""

    place: Path
    """A folder that every rank can reach and no rank watches."""
    rank: int = 0
    meet: Meet = field(default=lambda what, brought: (brought,))
    announce_failure: Callable[[BaseException | None], AbstractContextManager[None]] = field(
        default=lambda error: nullcontext()
    )
    """Context in which this rank reports an error to its peers instead of meeting them."""

    def agree(self, what: str, step: Callable[[], bytes]) -> Sequence[bytes | None]:
        """Run `step` in every rank and return all results, None for a dead rank. Collective.

        The ranks exchange whether a step failed before any of them continues: its exception is
        raised in the rank where it failed, and RecordingError in the others.
        """
        own_error: Exception | None = None
        try:
            message = OK + step()
        except Exception as error:  # noqa: BLE001 - raised again below
            own_error = error
            text = f"rank {self.rank}: {type(error).__name__}: {error}"
            # A fault of the recording itself is the same in all ranks: all raise it.
            message = FAILED + (str(error) if isinstance(error, RecordingError) else text).encode()
        with self.announce_failure(own_error):
            replies = self.meet(what, message)
        if own_error is not None:
            raise own_error
        for reply in replies:
            if reply is not None and reply.startswith(FAILED):
                raise RecordingError(reply.removeprefix(FAILED).decode())
        return [None if reply is None else reply.removeprefix(OK) for reply in replies]


OK, FAILED = b"+", b"-"


class RecordedPlace(Protocol):
    """The recorded storage: folders, wherever they are."""

    def trees(self) -> list[Tree]:
        """The current contents of each folder."""

    def watching(self, watcher: Watcher, rank: int) -> AbstractContextManager[None]:
        """Let the watcher observe operations on it until the block ends."""


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders on this machine."""

    roots: Sequence[Path]

    def trees(self) -> list[Tree]:
        """The current contents of each folder."""
        return [read_tree(root) for root in self.roots]

    def watching(self, watcher: Watcher, rank: int) -> AbstractContextManager[None]:
        """Let the watcher observe operations on them until the block ends."""
        return watch_operations(self.roots, watcher, rank=rank, observing=True)


class Log:
    """A watcher that appends each operation to a file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def before(self, operation: Operation) -> None:
        """Does nothing: it only observes."""

    def after(self, operation: Operation) -> None:
        """Append the operation."""
        self.append(operation)

    def append(self, entry: Operation | int) -> None:
        """Append an operation, or the time at which the block ended, with one write."""
        data = pickle.dumps(entry)
        count = os.write(self._fd, data)
        if count != len(data):
            raise RecordingError(f"only {count} of {len(data)} bytes of a record could be written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Recorded:
    """The result of a recording: complete once the block has ended."""

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
        """Set the result."""
        self._trace = trace


@contextmanager
def recording(place: RecordedPlace, desk: Desk, into: Recorded) -> Iterator[None]:
    """Record the operations on a place. Collective if the desk has several ranks.

    Raises RecordingError at the end if replaying the operations does not give the folders'
    contents.
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
            # The last operation of a killed rank may be missing from its file.
            check(found[0], place.trees())
        return b""

    desk.agree("record(): it is read", read)
    into.end(found[0])


def _begin(place: RecordedPlace, desk: Desk, clean_up: ExitStack) -> tuple[Path, bool]:
    """A folder for this recording, with the initial contents of the place; and whether this rank
    leads.

    `clean_up` removes the folder in the process that made it, however the recording ends.
    """
    replies = desk.meet("record(): it begins", b"here")
    leader = next(rank for rank, data in enumerate(replies) if data)
    leads = leader == (desk.rank if len(replies) > 1 else 0)

    def make() -> bytes:
        if not leads:
            return b""
        desk.place.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="recording-", dir=desk.place)
        # Errors are ignored: after a failure other ranks may still write there.
        clean_up.callback(shutil.rmtree, folder, ignore_errors=True)
        Path(folder, "base").write_bytes(pickle.dumps(place.trees()))
        return os.fsencode(folder)

    data = desk.agree("record(): the folder as it was", make)[leader]
    if data is None:
        raise RecordingError(f"rank {leader} died before it could tell what the folder holds")
    return Path(os.fsdecode(data)), leads


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
            # Each rank appends whole pickles; only the last can be cut, where the rank was killed.
            except (EOFError, pickle.UnpicklingError):
                return  # the end, or where a killed rank stopped


def check(trace: Trace, found: Sequence[Tree]) -> None:
    """Raise RecordingError unless replaying the whole trace gives the contents found."""
    machine = DiskModel.of(trace.base, Rules())
    impossible = in_order(machine, trace.operations, range(len(trace.operations)))
    if impossible:
        raise RecordingError(f"{trace.operations[impossible[0]]} could not be replayed: {UNSEEN}")
    replayed_tree, actual_tree = machine.visible_tree(), Trace.of(found, (), {}).base
    wrong = list(_differences(replayed_tree, actual_tree))
    if wrong:
        raise RecordingError(f"{'; '.join(wrong[:10])}: {UNSEEN}")


UNSEEN = (
    "something was done that Python does not see (by mmap, a C extension, another process, or a "
    "function of os that was bound to a name before the recording): write through Python, or "
    "record less"
)


def _differences(
    replayed_tree: Mapping[str, object], actual_tree: Mapping[str, object]
) -> Iterator[str]:
    for path in sorted(replayed_tree.keys() | actual_tree.keys()):
        one, other = replayed_tree.get(path, AbsentEntry), actual_tree.get(path, AbsentEntry)
        if one != other:
            yield f"{path!r} was recorded as {_describe(one)} and is {_describe(other)}"


class AbsentEntry:
    """Placeholder for a missing entry."""


def _describe(entry: object) -> str:
    if isinstance(entry, bytes):
        return f"a file of {len(entry)} bytes"
    if isinstance(entry, TreeLink):
        return f"a link to {entry.target!r}"
    return "a folder" if entry is None else "missing"
