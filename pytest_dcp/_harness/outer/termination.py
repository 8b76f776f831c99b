"""A handler of SIGTERM for one process: the children that it forks are terminated as ever.

A child of `os.fork` has the handlers of its parent until it sets others. A check of the process in
the handler is not enough: Python calls a handler some time after the signal has come, and a new
child forgets the signals that came before it has begun (`PyOS_AfterFork_Child`). So SIGTERM is
blocked around a fork: one that comes then waits in the kernel until the child has the default
action.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class TerminationHandler:
    """Installs a handler, for this process alone. Made once in a process."""

    def __init__(self) -> None:
        self._pid = 0
        """Of the process in which the handler is installed; 0: it is not."""
        self._old_handler: Any = signal.SIG_DFL
        self._old_mask: set[signal.Signals] | None = None
        """Of the thread that forks, while it does."""
        os.register_at_fork(
            before=self._block, after_in_parent=self._unblock, after_in_child=self._give_up
        )

    def install(self, handler: Handler) -> None:
        """From here on a SIGTERM calls it, in the main thread."""
        self._old_handler = signal.signal(signal.SIGTERM, handler)
        self._pid = os.getpid()

    def remove(self) -> None:
        """Put the earlier handler back; does nothing if none is installed here."""
        if self._pid == os.getpid():
            self._pid = 0
            signal.signal(signal.SIGTERM, self._old_handler)

    def _block(self) -> None:
        if self._pid == os.getpid():
            self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # type: ignore[assignment]  # of Signals, as Linux names them

    def _unblock(self) -> None:
        mask, self._old_mask = self._old_mask, None
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _give_up(self) -> None:
        """In the child, which is another process: its SIGTERM is its own."""
        if self._pid:
            self._pid = 0
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._unblock()


TERMINATION = TerminationHandler()
"""A function that is registered for forks cannot be taken back."""
