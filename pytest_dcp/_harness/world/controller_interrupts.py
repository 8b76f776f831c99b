"""When signals may interrupt the controller: while it waits for ranks, but not during an action.

Enters: the handlers of signals that are set when a world is driven. Leaves: the same handlers,
which meanwhile were called only where an exception of theirs does no harm. An interrupt between the
orders to two ranks would leave one of them waiting; a message that was read but not handled would
be lost.

Signals are not blocked: another thread of the process, such as a C library's, would then receive
them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

RELAYED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Signals whose handlers raise: Python's own, and plugins' for timeouts."""
# The functions in C: those in Python make enumerations' members, 72 of them for each test.
_handler_of = getattr(signal, "_signal", signal).getsignal
_set_handler = getattr(signal, "_signal", signal).signal


class _Hold:
    """A block of `Interrupts.held`. A class, since there are two for each message of a rank."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def __enter__(self) -> None:
        self._interrupts.begin_hold()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._interrupts.end_hold()
        if error is None:
            self._interrupts.relay_postponed()


class Interrupts:
    """The signals of this process while it drives a world."""

    def __init__(self) -> None:
        self.ignored = False
        """Whether Ctrl-C is a debugger's in a rank that has the terminal, and not the controller's.
        """
        self._depth = 0
        self._handlers: dict[int, Callable[[int, Any], object]] = {}
        self._hold_depth = 0
        self._postponed: list[int] = []
        self._hold = _Hold(self)

    @contextmanager
    def relayed(self) -> Iterator[None]:
        """In the block, handlers are called through `held` and `ignored`. May be nested."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            self._depth += 1
            if self._depth == 1:
                self._take()
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._give_back()

    def held(self) -> AbstractContextManager[None]:
        """Interrupts during the block are delayed until its end. May be nested."""
        return self._hold

    def begin_hold(self) -> None:
        """Delay interrupts."""
        self._hold_depth += 1

    def end_hold(self) -> None:
        """Inverse of `begin_hold`."""
        self._hold_depth -= 1

    def relay_postponed(self) -> None:
        """Call the handlers of interrupts that came meanwhile."""
        while self._postponed and not self._hold_depth:
            self._relay(self._postponed.pop(0), sys._getframe())

    def _take(self) -> None:
        for signum in RELAYED:
            handler = _handler_of(signum)
            if callable(handler):
                self._handlers[signum] = handler
                _set_handler(signum, self._relay)

    def _give_back(self) -> None:
        """Restore the handlers; an exception that one of them raises meanwhile is raised at the
        end.
        """
        raised: BaseException | None = None
        while self._handlers:
            try:
                signum, handler = next(iter(self._handlers.items()))
                _set_handler(signum, handler)
                del self._handlers[signum]
            except BaseException as error:  # noqa: BLE001  # raised below
                raised = error
        if raised is not None:
            raise raised

    def _relay(self, signum: int, frame: Any) -> None:
        if self._hold_depth:
            self._postponed.append(signum)
        elif not (self.ignored and signum == signal.SIGINT) and signum in self._handlers:
            self._handlers[signum](signum, frame)
