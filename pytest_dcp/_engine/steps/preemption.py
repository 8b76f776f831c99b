"""A scheduler asks a run to stop: which signals say so, and until when the run may still save.

Theory of operation. Schedulers send SIGTERM (or another signal that the job has asked for), wait
for some seconds, and then kill. They may send it to one rank, to all of them, or to all processes
of the job; it arrives at different times. So

- the handler only notes the time. It runs between two instructions of the main thread, which may be
  anywhere: it saves nothing, raises nothing, and calls the handler that was there before.
- no rank stops on its own account, since the others would wait for it. Each call of the manager in
  which the ranks talk to each other also carries the least number of seconds that any rank has
  left. After it all ranks know, or none.
- a save that runs counts the time itself, on each rank, as its bytes are written: shortly before
  the end it gives up, and removes its files. The newest whole step stays as it is.

A child process that was forked inherits the handler. There it puts the earlier one back, and
delivers the signal again: a worker of a data loader must end when it is asked to.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from pytest_dcp.errors import SaveAbandonedError

Handler = Callable[[int, FrameType | None], Any]
CLEANUP_SHARE, MOST_CLEANUP_S = 0.2, 2.0
"""The end of the grace, for a save that gives up: it removes its files."""


class StopRequest:
    """Whether this run has been asked to stop, as far as this rank knows."""

    def __init__(self, signals: int | Sequence[int] | None = None, grace_s: float = 0.0) -> None:
        """Wait for these signals. Raises ValueError outside of the main thread."""
        self.grace_s = _checked_grace(grace_s)
        self.is_agreed = False
        """Whether the ranks have agreed on it: then all of them know."""
        self._until_s: float | None = None
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}
        chosen = [signals] if isinstance(signals, int) else list(signals or [])
        if chosen and threading.current_thread() is not threading.main_thread():
            raise ValueError("on_signal= needs the main thread: Python runs handlers only there")
        try:
            for one in chosen:
                self._earlier[one] = signal.signal(one, self._note)
        except (OSError, ValueError, TypeError) as error:
            self.restore_handlers()
            raise ValueError(f"on_signal= takes signals that can be handled: {error}") from None

    @property
    def is_received(self) -> bool:
        """Whether a signal has arrived here, or the ranks have agreed that it has anywhere."""
        return self._until_s is not None

    @property
    def seconds_left(self) -> float:
        """Until the process may be killed; infinite before any signal."""
        return float("inf") if self._until_s is None else self._until_s - time.monotonic()

    def agree(self, seconds_left: float) -> None:
        """Note that a rank has this many seconds left; infinite: none has a signal."""
        if seconds_left != float("inf"):
            self._end_in(seconds_left)
            self.is_agreed = True

    def check(self, step: int) -> None:
        """Raise SaveAbandonedError if a save of this step can no longer end in time."""
        if self.seconds_left <= min(self.grace_s * CLEANUP_SHARE, MOST_CLEANUP_S):
            raise self.error_of(step)

    def error_of(self, step: int) -> SaveAbandonedError:
        """The error of a save of this step that was given up."""
        return SaveAbandonedError(
            f"the save of step {step} was given up: it did not end within {self.grace_s:g} s of "
            "the signal to stop; the steps before it are as they were"
        )

    def restore_handlers(self) -> None:
        """Put the earlier handlers back, unless other handlers have replaced these since."""
        if os.getpid() != self._process or not self._earlier:
            return
        if threading.current_thread() is threading.main_thread():
            for number, earlier in self._earlier.items():
                if signal.getsignal(number) == self._note:
                    signal.signal(number, earlier)
        self._earlier = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        earlier = self._earlier.get(number)
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
            os.kill(os.getpid(), number)
            return
        if self._earlier:
            self._end_in(self.grace_s)
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    def _end_in(self, seconds: float) -> None:
        """The first signal counts; another rank's may have come earlier."""
        until_s = time.monotonic() + seconds
        self._until_s = until_s if self._until_s is None else min(self._until_s, until_s)


def _checked_grace(grace_s: float) -> float:
    if not isinstance(grace_s, int | float) or isinstance(grace_s, bool):
        raise TypeError(f"grace_s= takes seconds, got {grace_s!r}")
    if not 0 <= grace_s < float("inf"):
        raise ValueError(f"grace_s= takes seconds from 0 on, got {grace_s}")
    return float(grace_s)
