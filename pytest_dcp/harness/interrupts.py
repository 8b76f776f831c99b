"""Ctrl-C while a debugger has the terminal: the debugger's, not the controller's."""

from __future__ import annotations

import signal
import threading
from typing import Any


class InterruptsIgnored:
    """Ctrl-C is the debugger's, not the controller's, while a rank has the terminal."""

    def __init__(self) -> None:
        self._previous: Any = None

    def set(self, ignored: bool) -> None:
        """Ignore SIGINT, or handle it as before."""
        if threading.current_thread() is not threading.main_thread():
            return
        if ignored and self._previous is None:
            self._previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        elif not ignored and self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
