"""The files of a plan in a queue, as torch's storages hand them to the threads that read them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.threads import StopFlag


class FileQueue(queue.Queue[Any]):
    """Paths of files, each with its items. A thread gets no more once another one has failed."""

    def __init__(self, files: Iterable[tuple[str, Sequence[Any]]], observer: Observer) -> None:
        super().__init__()
        self.bytes_read = 0
        self.stop = StopFlag()
        """Set it to that of the threads before they begin."""
        self._observer = observer
        self._counting = threading.Lock()
        for file in files:
            self.put(file)

    def get_nowait(self) -> Any:
        """The next file; raises queue.Empty where none is left, Stopped after a failure."""
        self.stop.check()
        return super().get_nowait()

    def advance(self, nbytes: int) -> None:
        """Report more bytes as read. Raises the exception that stops the work."""
        self.stop.check()
        with self._counting:
            self.bytes_read += nbytes
        self._observer.advance(nbytes)
