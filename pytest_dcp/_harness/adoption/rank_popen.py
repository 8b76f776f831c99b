"""A process that runs as a rank, as its `multiprocessing.Process` holds it: a `Popen` of ours.

`Process.join`, `is_alive`, `exitcode`, `terminate` and `sentinel` work on it unchanged.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from pytest_dcp.errors import WorldError

if TYPE_CHECKING:
    from pytest_dcp._harness.adoption.process_set import ProcessSet


class RankPopen:
    """One process, as its `Process` object holds it."""

    method = "spawn"

    def __init__(self, processes: ProcessSet, rank: int, *, daemon: bool) -> None:
        self.processes = processes
        self.rank = rank
        self.daemon = daemon
        self.pid = processes.world.pid(rank)
        self.returncode: int | None = None
        self.is_judged = False
        """Whether the test has looked at the exit code, or ended the process itself."""
        # Readable at the end of the process, for `multiprocessing.connection.wait`.
        self.sentinel, self._alive = os.pipe()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The exit code; None while the process runs."""
        del flag
        if self.returncode is None:
            self.processes.drive_all(lambda: True)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end, which the test's time limit bounds. Returns the exit code, or None."""
        self.processes.drive_all(lambda: self.returncode is not None, timeout)
        return self.returncode

    def see_end(self, code: int) -> None:
        """The process has ended; `code` is negative for a signal."""
        if self.returncode is None:
            self.returncode = code
            os.close(self._alive)

    def terminate(self) -> None:
        """End the process for the test; a failure that it had not before is none."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """See `terminate`."""
        self._end(signal.SIGKILL)

    def interrupt(self) -> None:
        """See `terminate`; for Python 3.14."""
        self._end(signal.SIGINT)

    def _end(self, signum: signal.Signals) -> None:
        if self.poll() is None:
            self.is_judged = True
            # It may have ended meanwhile.
            with self.processes.test.busy(), contextlib.suppress(WorldError):
                self.processes.world.apply_fault("kill", self.rank, f"{signum.name} by the test")
            self.see_end(-signum)

    def close(self) -> None:
        """The test is done with the process."""
        self.see_end(0)
        with contextlib.suppress(OSError):
            os.close(self.sentinel)
        self.sentinel = -1
