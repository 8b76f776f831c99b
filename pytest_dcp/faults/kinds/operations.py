"""Faults of storage operations: system errors, partial work, pretended work.

Injected at a hook's name, they act at operations made while the hook runs.

>>> from pathlib import Path
>>> from pytest_dcp.faults.storage import FaultyStorage
>>> folder, counts = Path("checkpoint"), Path("counts")
>>> folder.mkdir(), counts.mkdir()
(None, None)
>>> def try_write(fault, nbytes, **where):
...     with FaultyStorage(folder, counts) as storage:
...         storage.inject(fault, on="write", **where)
...         with open(folder / "data", "wb", buffering=0) as file:
...             try:
...                 return file.write(bytes(nbytes))
...             except OSError as error:
...                 return error.strerror, os.path.getsize(folder / "data")

A short write says so. A torn one has stored its part when it fails:

>>> try_write(ShortWrite(3), 8), try_write(TornWrite(at=3), 8)
(3, ('Input/output error', 3))

A full disk accepts the bytes that fit, and fails the next write:

>>> try_write(NoSpace(after_bytes=100), 64), try_write(NoSpace(), 64)
(64, ('No space left on device', 0))
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from pytest_dcp.errors import StoreResponseError
from pytest_dcp.faults.kinds.base import Fault, Level, Moment
from pytest_dcp.faults.tap.operation import Alternative, Operation, Shorten, Skip, Verdict

NAMED = ("make_folder", "create", "truncate", "rename", "link", "remove", "remove_folder")
"""Operations that change names or lengths."""
SYNCS = ("sync", "sync_folder")


class StorageFault(Fault):
    """A fault of storage operations: the base."""

    __slots__ = ()

    level: ClassVar[Level] = "operations"


class _SystemError(StorageFault):
    """Raises the OSError that the system would."""

    __slots__ = ()

    number: ClassVar[int]

    def before(self, moment: Moment) -> Verdict | None:
        raise system_error(self.number, moment)


def system_error(number: int, moment: Moment) -> OSError:
    """The OSError of an errno, naming the operation's file as the system would."""
    operation = moment.operation
    path = operation.path if operation is not None else moment.where
    file = str(moment.file) if moment.file is not None else path
    if moment.target is not None:
        return OSError(number, os.strerror(number), file, None, str(moment.target))
    return OSError(number, os.strerror(number), file)


@dataclass(frozen=True, slots=True)
class Errno(StorageFault):
    """The system's error of any number."""

    code: int

    def before(self, moment: Moment) -> Verdict | None:
        raise system_error(self.code, moment)

    def __repr__(self) -> str:
        return f"Errno({int(self.code)})"


class _Full(_SystemError):
    """No space; with a budget, only once that many bytes were written: the write that exceeds it is
    first cut short, and the next one fails.
    """

    __slots__ = ()

    during = ("make_folder", "create", "write", "allocate")
    after_bytes: int | None

    def before(self, moment: Moment) -> Verdict | None:
        return Shorten(moment.room_bytes) if moment.room_bytes else super().before(moment)

    def problems(self) -> list[str]:
        budget = self.after_bytes
        if budget is not None and (not isinstance(budget, int) or budget < 0):
            return [f"after_bytes takes a whole number >= 0; got {budget!r}"]
        return []


@dataclass(frozen=True, slots=True)
class NoSpace(_Full):
    """ENOSPC: the device is full, perhaps after `after_bytes`."""

    number = errno.ENOSPC
    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Quota(_Full):
    """EDQUOT: the user's quota is used up, perhaps after `after_bytes`."""

    number = errno.EDQUOT
    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ReadOnly(_SystemError):
    """EROFS: the file system has become read-only."""

    number = errno.EROFS
    during = NAMED


@dataclass(frozen=True, slots=True)
class Denied(_SystemError):
    """EACCES: permission denied."""

    number = errno.EACCES
    during = ("list", "open", *NAMED)


@dataclass(frozen=True, slots=True)
class Stale(_SystemError):
    """ESTALE: the network file system no longer knows the file."""

    number = errno.ESTALE


@dataclass(frozen=True, slots=True)
class Interrupted(_SystemError):
    """EINTR: a signal interrupted the call."""

    number = errno.EINTR


@dataclass(frozen=True, slots=True)
class InputOutput(_SystemError):
    """EIO: the device failed."""

    number = errno.EIO


@dataclass(frozen=True, slots=True)
class SyncFailsOnce(_SystemError):
    """EIO from a sync, and success from the next one: the first has dropped the bytes."""

    number = errno.EIO
    operations = SYNCS


@dataclass(frozen=True, slots=True)
class LyingSync(StorageFault):
    """A sync that does nothing and reports success."""

    operations = SYNCS

    def before(self, moment: Moment) -> Verdict | None:
        return Skip()


@dataclass(frozen=True, slots=True)
class ShortRead(StorageFault):
    """A read returns only some of the bytes, by default half. 0 looks like the end of the file."""

    nbytes: int | None = None

    operations = ("read",)

    def before(self, moment: Moment) -> Verdict | None:
        return Shorten(_part(self.nbytes, moment))


@dataclass(frozen=True, slots=True)
class ShortWrite(StorageFault):
    """A write takes only some of the bytes, by default half, and reports that number."""

    nbytes: int | None = None

    operations = ("write",)

    def before(self, moment: Moment) -> Verdict | None:
        return Shorten(_part(self.nbytes, moment))


@dataclass(frozen=True, slots=True)
class TornWrite(StorageFault):
    """Only the first bytes of a write, by default half, are stored; then another fault acts."""

    at: int | None = None
    then: Fault = InputOutput()

    operations = ("write",)

    def before(self, moment: Moment) -> Verdict | None:
        return Shorten(_part(self.at, moment))

    def after(self, moment: Moment) -> None:
        self.then.before(moment)


def _part(nbytes: int | None, moment: Moment) -> int:
    whole = moment.operation.nbytes if moment.operation is not None else 0
    # Not 0 by default: that is the end of a file, and a writer that gets it at each write never
    # ends.
    return max(whole // 2, 1) if nbytes is None else min(nbytes, whole)


@dataclass(frozen=True, slots=True)
class TornRename(StorageFault):
    """A rename that is not atomic: the entry with the new name is removed, then another
    fault acts.
    """

    then: Fault = InputOutput()

    operations = ("rename",)

    def before(self, moment: Moment) -> Verdict | None:
        def act(operation: Operation, do: Callable[[], Any]) -> Any:
            if moment.target is not None:
                moment.target.unlink(missing_ok=True)
            self.then.before(moment)
            return do()

        return Alternative(act)


@dataclass(frozen=True, slots=True)
class PartialListing(StorageFault):
    """A listing without the names that match."""

    hidden: str = "*"

    operations = ("list",)

    def before(self, moment: Moment) -> Verdict | None:
        return Alternative(lambda _, do: listing(do(), lambda name: not self._hides(name)))

    def _hides(self, name: str) -> bool:
        return fnmatchcase(name, self.hidden)


@dataclass(frozen=True, slots=True)
class StaleListing(StorageFault):
    """A listing without the names created since the injection."""

    operations = ("list",)

    def before(self, moment: Moment) -> Verdict | None:
        names = moment.names_before
        return Alternative(lambda _, do: listing(do(), names.__contains__))


class FewerEntries:
    """The result of `os.scandir` without some of its entries."""

    def __init__(self, entries: Any, is_listed: Callable[[str], bool]) -> None:
        self._entries = entries
        self._is_listed = is_listed

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(entry for entry in self._entries if self._is_listed(entry.name))

    def __enter__(self) -> FewerEntries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder."""
        self._entries.close()


def listing(result: Any, is_listed: Callable[[str], bool]) -> Any:
    """A listing of the selected names, in the form of `os.listdir`, `os.scandir` or a store."""
    if hasattr(result, "close"):
        return FewerEntries(result, is_listed)
    return [name for name in result if is_listed(os.path.basename(str(name).rstrip("/")))]


class _Response(Fault):
    """Raises an object store's error; injected at a hook, it acts at the hook itself."""

    __slots__ = ()

    status: ClassVar[int]
    reason: ClassVar[str]

    def before(self, moment: Moment) -> Verdict | None:
        raise StoreResponseError(self.status, self.reason, str(moment))


@dataclass(frozen=True, slots=True)
class Unavailable(_Response):
    """503: slow down, and try again."""

    status = 503
    reason = "Slow Down"


@dataclass(frozen=True, slots=True)
class PreconditionFailed(_Response):
    """412: another client has changed the object."""

    status = 412
    reason = "Precondition Failed"
