"""Pure (no I/O): operations on storage, and what may happen instead.

An `Operation` is one call that reached the storage, seen from a watched root. A `Verdict` is the
answer of a watcher of operations: do less, do nothing, do something else.
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

    `create` opens an empty file, new or truncated; every other opening is `open`.
    """

    kind: OperationKind
    path: str
    """Posix, relative to the watched root; "." is the root. Absolute if it is outside of the root:
    the source of a rename or link into it.
    """
    root: int = 0
    """Index of the watched root."""
    to: str | None = None
    """For a rename or link: the new name, relative like `path`."""
    offset: int | None = None
    """In bytes; for read, write and allocate. None: the current position, as in a stream."""
    data: bytes | None = None
    """The bytes of a write; the target of a symbolic link; the bytes of a file that is renamed or
    linked into the root from outside.
    """
    nbytes: int = 0
    """Bytes of a read, write or allocate; the new size for a truncate. Before a read, the number
    requested; after it, the number read.
    """
    handle: int = 0
    """Identifies the opening that this goes through: unique within the process, 0 for none. A file
    may be renamed while it is open.
    """
    rank: int = 0
    thread: str = ""
    """The thread's name."""
    started_ns: int = 0
    """CLOCK_MONOTONIC, comparable between the processes of one machine."""
    ended_ns: int = 0
    """0 until it is done."""

    def __str__(self) -> str:
        where = self.path if self.to is None else f"{self.path} -> {self.to}"
        span = "" if self.offset is None else f" [{self.offset}, {self.offset + self.nbytes})"
        return f"{self.kind} {where}{span} (rank {self.rank}, {self.thread})"


@dataclass(frozen=True, slots=True)
class Shorten:
    """A read or write of only the first bytes, which the caller can see."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Nothing is done, and success is pretended. Not for operations with a result: an opening, a
    read or a listing.
    """


@dataclass(frozen=True, slots=True)
class Replace:
    """Other bytes: returned by a read, or stored by a write that claims to have stored its own."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another action; its return value is the operation's result (bytes, for a read)."""

    act: Callable[[Operation, Callable[[], Any]], Any]
    """Called with the operation and a function that performs it."""


Verdict = Shorten | Skip | Replace | Alternative
