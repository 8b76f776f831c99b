"""One process at a time saves in a run's folder, if the folder is local: a store has no locks."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import filelock

from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp.errors import CheckpointError

LOCK = ".steps.lock"


class RunLock:
    """The lock of one process on one run's folder."""

    def __init__(self) -> None:
        self._lock: filelock.BaseFileLock | None = None

    def take(self, folders: StepFolders) -> None:
        """Keep other processes from saving in the folder; does nothing if this one has the lock.

        Raises CheckpointError, naming the other process, if another has it.
        """
        root = folders.root
        if self._lock is not None or not isinstance(root.disk, LocalDisk):
            return
        root.make()
        path = Path(root.path) / LOCK
        lock = filelock.FileLock(path, timeout=0)
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
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock = lock

    def release(self) -> None:
        """Let another process save."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
