"""Pure (no I/O): what code does to storage, and what may happen instead.

An `Operation` is one call that reached the storage, seen from a watched root. A `Verdict` is what a
watcher of operations answers: do less, do nothing, do something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

OperationKind = Literal[
    "make_folder", "list", "create", "open", "write", "read", "allocate", "truncate", "sync",
    "sync_folder", "close", "rename", "link", "remove", "remove_folder",
]  # fmt: skip
OPERATION_KINDS: tuple[OperationKind, ...] = get_args(OperationKind)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on storage.

    `create` gives an empty file of that name, new or emptied; every other opening is `open`.
    """

    kind: OperationKind
    path: str
    """Posix, relative to the watched root; "." is the root. Absolute where it is outside of it:
    the source of a rename or link into the root."""
    root: int = 0
    """Which of the watched roots."""
    to: str | None = None
    """Of a rename or link: the new name, relative as `path`."""
    offset: int | None = None
    """Bytes; of read, write and allocate. None: wherever the last one ended, as in a stream."""
    data: bytes | None = None
    """What a write stores; the target of a symbolic link; the bytes of a file that is renamed or
    linked into the root from outside."""
    nbytes: int = 0
    """Bytes of a read, write or allocate; the new size of a truncate. Before a read, those asked
    for; after it, those got."""
    handle: int = 0
    """Which opening this goes through: unique within the process, 0 for none. A file may be
    renamed while it is open."""
    rank: int = 0
    thread: str = ""
    """The thread's name."""
    started_ns: int = 0
    """CLOCK_MONOTONIC, comparable between the processes of one machine."""
    ended_ns: int = 0
    """0 while it is not done."""

    def __str__(self) -> str:
        where = self.path if self.to is None else f"{self.path} -> {self.to}"
        span = "" if self.offset is None else f" [{self.offset}, {self.offset + self.nbytes})"
        return f"{self.kind} {where}{span} (rank {self.rank}, {self.thread})"


@dataclass(frozen=True, slots=True)
class Shorten:
    """A read or write of only the first bytes, as the caller can see."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Nothing is done, and success is pretended. Not for what must give something: an opening, a
    read or a listing."""


@dataclass(frozen=True, slots=True)
class Replace:
    """Other bytes: what a read returns, or what a write stores while it claims to have stored its
    own."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Alternative:
    """Something else is done; what it returns is the operation's result (bytes, for a read)."""

    act: Callable[[Operation, Callable[[], Any]], Any]
    """Called with the operation, and a function that does it."""


Verdict = Shorten | Skip | Replace | Alternative
