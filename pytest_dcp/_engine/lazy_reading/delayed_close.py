"""Closes files that other threads may be reading: the last read in progress closes them.

A descriptor that is closed under a read may get another file's number meanwhile, whose bytes would
be returned.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class DelayedClose:
    """The reads in progress, and what to do after the last one of a closed checkpoint."""

    def __init__(self, where: str, close_files: Callable[[], None]) -> None:
        """where: names the checkpoint in errors. close_files: is called once."""
        self._where = where
        self._close_files = close_files
        self._lock = threading.Lock()
        self._reads = 0
        self._is_closed = False

    @contextlib.contextmanager
    def keep_open(self) -> Iterator[None]:
        """The files stay open inside. Raises ValueError if the checkpoint was closed."""
        with self._lock:
            if self._is_closed:
                raise ValueError(f"the checkpoint in {self._where} was closed")
            self._reads += 1
        try:
            yield
        finally:
            with self._lock:
                self._reads -= 1
                close_now = self._must_close()
            if close_now:
                self._close_files()

    def close(self) -> None:
        """Close the files now, or after the last read in progress."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            close_now = not was_closed and self._must_close()
        if close_now:
            self._close_files()

    def _must_close(self) -> bool:
        return self._is_closed and not self._reads
