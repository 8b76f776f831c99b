"""Processes that ranks started and left behind: found by the ranks' tokens and files, and killed.

For processes that end without a chance to clean up: a zygote killed by SIGKILL, or a controller
whose ranks are spawned. In the second case a separate process keeps watch: its `main` waits for the
end of its standard input, which only the controller holds open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection

from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import RANK_VARIABLE

File = tuple[int, int]
"""Device and inode."""
SWEEP_S = 1.0
"""Bounds the killing of processes that keep starting others."""


def file_of(fd: int) -> File:
    """The open file behind a descriptor."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def sweep(prefix: str, files: Collection[File] = ()) -> None:
    """Kill the processes whose token begins with `prefix`, and those with one of `files` open.

    A program has the token in its environment; a child forked from a forked rank does not, but it
    has the rank's files open.
    """
    deadline = time.monotonic() + SWEEP_S
    while (found := _find_processes(prefix, files)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _find_processes(prefix: str, files: Collection[File]) -> list[int]:
    return [
        pid
        for pid in linux.processes()
        if pid != os.getpid()
        and linux.state_of(pid) not in ("Z", "X", "")
        and (linux.variable_of(pid, RANK_VARIABLE).startswith(prefix) or _has_open(pid, files))
    ]


def _has_open(pid: int, files: Collection[File]) -> bool:
    with contextlib.suppress(OSError):  # it ended, or is another user's
        for name in os.listdir(f"/proc/{pid}/fd") if files else ():
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{name}")
                if (status.st_dev, status.st_ino) in files:
                    return True
    return False


def main() -> None:
    """Wait for the controller's end, then sweep; the prefix is the first argument."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(sys.argv[1])
