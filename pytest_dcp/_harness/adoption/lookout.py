"""Looks after a test's processes while the test itself waits elsewhere, for a queue for example.

The test's own thread drives its worlds, and no other may. So a second thread only sends it a
signal, several times a second, and the handler does the work between two steps of the test. A wait
in C ends for the handler and goes on after it (PEP 475), unless the handler raises.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

LOOK_S = 0.25
LOOK_SIGNAL = signal.SIGRTMAX - 4 if hasattr(signal, "SIGRTMAX") else None
"""A real-time signal, since tests use SIGUSR1 and SIGUSR2 themselves."""


class Lookout:
    """Calls `look` in the main thread until `stop`."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler_before: Any = None

    def start(self) -> None:
        """Begin to look. Does nothing a second time, or outside of the main thread."""
        is_main = threading.current_thread() is threading.main_thread()
        if self._thread is not None or not is_main or LOOK_SIGNAL is None:
            return
        self._handler_before = signal.signal(LOOK_SIGNAL, lambda *_: self._look())
        self._thread = threading.Thread(target=self._send, name="dcp-lookout", daemon=True)
        self._thread.start()

    def _send(self) -> None:
        main = threading.main_thread().ident
        while not self._stopped.wait(LOOK_S):
            if main is not None and LOOK_SIGNAL is not None:
                signal.pthread_kill(main, LOOK_SIGNAL)

    def stop(self) -> None:
        """Look no longer."""
        if self._thread is not None and LOOK_SIGNAL is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            signal.signal(LOOK_SIGNAL, signal.SIG_IGN)  # one may be on its way
            signal.signal(LOOK_SIGNAL, self._handler_before or signal.SIG_DFL)
