"""Files that stay open from the moment a load knows their names until it has read them.

A file that a later save removes or replaces can still be read through an open descriptor. So once a
load has opened every file of its plan, no save can disturb it. Descriptors are scarce: a load keeps
at most half of the process's limit, and reopens the other files each time. It remembers their
identity and refuses another file under the same name.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.io.disk import Disk, In
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp.errors import CheckpointReplacedError

NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


def most_files() -> int:
    """How many files a load may keep open."""
    soft, _ = operating_system.limits_of_open_files()
    return (1 << 20) if soft < 0 else soft // 2


class OpenFiles(LocalDisk):
    """A disk that uses the open files of one folder, and opens all other files as usual."""

    def __init__(self, disk: LocalDisk, folder: Any, *, most: int | None = None) -> None:
        """most: how many files are kept open at most, besides the process's limit."""
        super().__init__(follow_links=disk.follow_links)
        self.disk: Disk = disk
        self.folder = folder
        self.complete = True
        """Whether every file that should be kept is open."""
        self._most = most_files() if most is None else min(most, most_files())
        self._files: dict[str, LocalIn] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        """The identity of files that are not kept open, to detect a replacement."""
        self._stack = contextlib.ExitStack()

    def keep(self, name: str) -> In | None:
        """Open the file and keep it open; None if there is no descriptor left for it.

        Raises the error of opening it.
        """
        if name in self._files:
            return self._files[name]
        if len(self._files) >= self._most:
            self.complete = False
            return None
        try:
            file = self._stack.enter_context(self.disk.open(self.folder, name))
        except OSError as error:
            if error.errno not in NO_DESCRIPTORS:
                raise
            # The process needs some for its other work.
            self.complete, self._most = False, 0
            return None
        if not isinstance(file, LocalIn):
            self.complete = False
            return file
        self._files[name] = file
        return file

    @contextlib.contextmanager
    def open(self, folder: Any, name: str) -> Iterator[In]:
        inside = os.fspath(folder) == os.fspath(self.folder)
        shared_file = self.keep(name) if inside else None
        if isinstance(shared_file, LocalIn):
            again = shared_file.again()
            try:
                yield again
            finally:
                again.close()
            return
        with self.disk.open(folder, name) as file:
            if inside and isinstance(file, LocalIn):
                self._check_same(name, os.fstat(file.fd))
            yield file

    def _check_same(self, name: str, status: os.stat_result) -> None:
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._seen.setdefault(name, now) != now:
            raise CheckpointReplacedError(
                f"the checkpoint in {self.folder} was replaced while it was being loaded, and "
                f"{name} is another file now: load again"
            )

    def close(self) -> None:
        """Close the files, ignoring errors, since the files were only read."""
        self._files.clear()
        self._seen.clear()
        with contextlib.suppress(OSError):
            self._stack.close()
