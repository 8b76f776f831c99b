"""Leases: readers of a save hold it for a moment, and the next save's commit waits that long.

The lock is flock(2) on the file that a commit replaces, the metadata of the save in force: shared
for readers, exclusive for the commit. No lock file is left in the folder, and the lock of a process
that dies ends with it. All ranks that hold a lease on the file of that name at the same time have
read the same save, because no commit can happen in between.

The two sides:

- a reader opens the file, locks it, and looks whether the name still leads to it; if not, a commit
  came between, and it begins again with the new file;
- a commit locks the existing file, then renames its own over it. A slow or stopped reader delays
  the commit by at most `LEASE_S`: then the commit goes on, and the reader finds another save.

The cases, where the reader R opens the file and the commit C wants to replace it:

- R has its lock first: C waits. R plans and opens its data files, then lets go; C renames. The open
  files stay readable, since Unix removes a file only when its last descriptor is closed.
- C has its lock first: R waits for it, at most `LEASE_S`. C renames and closes the old file. R gets
  a lock on a file that no longer has the name, sees that, and begins again with the new one.
- R starts between the rename and C's end: it opens the new file, which is not locked.
- R dies: the kernel closes its descriptor, and with it the lock goes.
- C dies before the rename: its lock goes, the old file keeps its name. C dies after it: the new
  file already has the name.
- R is late: C goes on without it. R may find its data files swept, and its load begins again.

A lock belongs to the open file description, not to the process: a child forked meanwhile shares it
until it closes the descriptor or executes a program.

Assumes that the file system supports flock, also between machines that share it. If it does not,
nothing is locked, and readers try again instead. Guarantees bounded waits (`LEASE_S`) for both
sides, and nothing more: a lease makes it likely that a load needs no second try, and a load reads
the right bytes without it too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from pytest_dcp._engine import operating_system

LEASE_S = 10.0
"""How long a commit waits for readers: they plan and open their files meanwhile."""
FIRST_PAUSE_S = 0.0005
LAST_PAUSE_S = 0.02


@contextlib.contextmanager
def hold_lease(folder: Path, name: str) -> Iterator[None]:
    """Hold off the commit that would replace this file; does nothing if there is no such file."""
    fd = _locked_file(Path(folder) / name)
    try:
        yield
    finally:
        if fd is not None:
            _close(fd)


def _locked_file(path: Path) -> int | None:
    """A descriptor of the file that has this name now, with a shared lock; None without one."""
    until_s = time.monotonic() + LEASE_S
    while True:
        try:
            fd = os.open(path, operating_system.READ)
        except OSError:
            return None  # reading it will raise the error
        try:
            locked = _lock(fd, until_s, shared=True)
            # If the lock had to wait for a commit, this may be the file that the commit replaced.
            if not locked or os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            _close(fd)
            raise
        _close(fd)
        if time.monotonic() > until_s:
            return None


@contextlib.contextmanager
def wait_for_leases(folder: Path, name: str) -> Iterator[None]:
    """Inside, no reader can acquire this file; earlier readers have released it, or are late."""
    if operating_system.open_files_hold_their_names():
        yield  # the replacement itself waits for readers, and would wait for this file, too
        return
    try:
        fd = os.open(Path(folder) / name, operating_system.READ)
    except OSError:
        yield  # there is nothing to replace, or replacing it raises the error
        return
    try:
        _lock(fd, time.monotonic() + LEASE_S, shared=False)
        yield
    finally:
        _close(fd)


def _close(fd: int) -> None:
    """Close a file that was only read, ignoring errors."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _lock(fd: int, until_s: float, *, shared: bool) -> bool:
    """Whether the lock was acquired before the deadline; closing the descriptor releases it."""
    # Polled, since flock(2) has no timeout, and a signal to end its wait would be the program's.
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return operating_system.lock_file(fd, shared=shared)
        except BlockingIOError:
            if time.monotonic() > until_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
