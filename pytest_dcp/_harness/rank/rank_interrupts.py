"""A rank's side of an interrupt: a signal that raises KeyboardInterrupt where a test is at work.

Enters: INTERRUPT_SIGNAL, which the controller sends when the session is interrupted. Leaves:
KeyboardInterrupt in the main thread, only inside a phase.

Not SIGINT: a test may handle or ignore that one, or send it to itself.

Rules that hold inside:

- Each phase is interrupted once at most, however often the signal comes. A `finally` block that
  the interrupt has started is left alone.
- A rank that has answered, or waits for an order, is at no work: a signal that crosses its answer
  has no effect.
- Messages are read and written whole. A signal that comes meanwhile waits for that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pytest_dcp._harness.protocol.launcher import INTERRUPT_SIGNAL


class RankInterrupts:
    """The interrupts of this process."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._is_heard = False
        self._block_depth = 0
        """How many messages are on their way; one inside another at times."""
        self._is_waiting = False
        self.came = False
        """Whether the phase was interrupted."""

    def install(self, say_so: Callable[[], None]) -> None:
        """Handle the signal from here on; `say_so` is called before KeyboardInterrupt is raised."""
        self._say_so = say_so
        signal.signal(INTERRUPT_SIGNAL, self._interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {INTERRUPT_SIGNAL})

    def _interrupt(self, signum: int, frame: object) -> None:
        if not self._is_heard or self.came:
            return
        self.came = True
        if self._block_depth:
            self._is_waiting = True
            return
        self._raise()

    def _raise(self) -> None:
        self._is_waiting = False
        self._say_so()
        raise KeyboardInterrupt

    @contextmanager
    def heard(self) -> Iterator[None]:
        """The block is a phase's work: an interrupt raises KeyboardInterrupt in it.

        Code after the block is not interrupted; the block's last moment may be.
        """
        self.came = self._is_waiting = False
        self._is_heard = True
        try:
            yield
        finally:
            self._is_heard = False

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Inside `heard`, a rank answers and waits for what to do next: it does not work."""
        was_heard, self._is_heard = self._is_heard, False
        try:
            yield
        finally:
            self.came = self._is_waiting = False
            self._is_heard = was_heard

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block is not interrupted in the middle, but at its end."""
        if threading.get_ident() != self._main:  # signals are handled in the main thread
            yield
            return
        self._block_depth += 1
        try:
            yield
        finally:
            self._block_depth -= 1
        if self._is_waiting and not self._block_depth:
            self._raise()
