"""Observers of a save or load while its bytes move.

An `Observer` is called for every piece; it may count, show progress, or raise to stop the work.
Storages get it through `observe_with`, since their hooks have no argument for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """How far this rank has got."""

    operation: Literal["save", "load"]
    rank: int
    done_bytes: int
    total_bytes: int
    """Bytes of this rank's own plan; 0 until it is known."""


class Observer:
    """Counts the bytes of one rank's save or load; any of its threads may call it."""

    def __init__(
        self,
        operation: Literal["save", "load"],
        rank: int = 0,
        *,
        check: Callable[[], None] = lambda: None,
        progress: Callable[[Progress], None] | None = None,
        every_s: float = 0.1,
    ) -> None:
        """check: called from time to time; its exception ends the work (for example, a peer has
        failed).

        progress: called with the state at most every `every_s` seconds, and at the end. If it is
        also a context manager, it is entered for the duration of the work. Raises TypeError if it
        is not callable.
        """
        if progress is not None and not callable(progress):
            raise TypeError(f"progress takes a function of a Progress; got {progress!r:.200}")
        self.operation: Literal["save", "load"] = operation
        self.rank = rank
        self.done_bytes = 0
        self.total_bytes = 0
        self._check = check
        self._progress = progress
        self._every_s = every_s
        self._next = 0.0
        self._lock = threading.Lock()

    def shown_while_working(self) -> AbstractContextManager[object]:
        """A context manager to hold open during the work."""
        return shown_while_working(self._progress)

    def expect(self, total_bytes: int) -> None:
        """Say how many bytes there will be."""
        with self._lock:
            self.total_bytes = total_bytes
            self._tell()

    def advance(self, nbytes: int) -> None:
        """Report `nbytes` more as done. Raises the exception that stops the work."""
        self._check()
        with self._lock:
            self.done_bytes += nbytes
            last = self.done_bytes >= self.total_bytes > 0
            if self._progress is not None and (last or time.monotonic() >= self._next):
                self._next = time.monotonic() + self._every_s
                self._tell()

    def silent(self) -> Observer:
        """An observer for bytes that are counted elsewhere: it only checks whether to go on."""
        return Observer(self.operation, self.rank, check=self._check)

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(Progress(self.operation, self.rank, self.done_bytes, self.total_bytes))


def shown_while_working(
    progress: Callable[[Progress], None] | None,
) -> AbstractContextManager[object]:
    """The progress, if it is a context manager to hold open during the work, as a bar is."""
    return progress if isinstance(progress, AbstractContextManager) else nullcontext()


_current: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observe_with(observer: Observer) -> Iterator[None]:
    """Hand the observer to the storages that are called inside."""
    token = _current.set(observer)
    try:
        with observer.shown_while_working():
            yield
    finally:
        _current.reset(token)


def observer(operation: Literal["save", "load"]) -> Observer:
    """The observer of the current work, or an observer that does nothing."""
    return _current.get() or Observer(operation)
