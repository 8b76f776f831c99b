"""One process at a time saves in a run's folder, if the folder is local: a store has no locks."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

import filelock

from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp.errors import CheckpointError

LOCK = ".steps.lock"
NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL))
"""Errors by which a file system (Lustre, NFS or FUSE, as some mount them) refuses all locks."""


class RunLock:
    """The lock of one process on one run's folder."""

    def __init__(self) -> None:
        self._lock: filelock.BaseFileLock | None = None

    def take(self, folders: StepFolders) -> bool:
        """Keep other processes from saving in the folder; does nothing if this one has the lock.

        Returns False where there are no locks. Raises CheckpointError, naming the other process, if
        another has it.
        """
        root = folders.root
        if self._lock is not None:
            return True
        if not isinstance(root.disk, LocalDisk):
            return False
        root.make()
        path = Path(root.path) / LOCK
        # A soft lock would outlive a killed holder, and keep its run from going on elsewhere.
        lock = filelock.FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            holder = ""
            with suppress(OSError):
                holder = path.read_text().strip()
            raise CheckpointError(
                f"another run saves in {folders}"
                f"{f' ({holder})' if holder else ''}: one run at a time can"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock = lock
        return True

    def release(self) -> None:
        """Let another process save."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
