"""A disk that records which files a save has made, so that a failed save can remove them.

All of a writer's files pass here, under any name and from any of its steps, so a writer that
replaces a step cannot forget one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pytest_dcp._engine.io.disk import Disk, In, Out

CreatedFiles = dict[tuple[Any, str], None]
"""Folder and name of each file, in the order in which they were made."""


class RegisteringDisk:
    """Another disk, and a register of the files made through this one."""

    def __init__(self, disk: Disk, created_files: CreatedFiles) -> None:
        self.disk = disk
        self.created_files = created_files
        self.renames = disk.renames

    @contextmanager
    def create(self, folder: Any, name: str) -> Iterator[Out]:
        with self.disk.create(folder, name) as out:
            self.created_files[folder, name] = None
            yield out

    def replace(self, folder: Any, old: str, new: str) -> None:
        self.disk.replace(folder, old, new)
        self.created_files.pop((folder, old), None)
        self.created_files[folder, new] = None

    def remove(self, folder: Any, name: str) -> None:
        self.disk.remove(folder, name)
        self.created_files.pop((folder, name), None)

    def make_folder(self, folder: Any) -> Sequence[Any]:
        return self.disk.make_folder(folder)

    def names(self, folder: Any) -> list[str]:
        return self.disk.names(folder)

    def exists(self, folder: Any, name: str) -> bool:
        return self.disk.exists(folder, name)

    def open(self, folder: Any, name: str) -> AbstractContextManager[In]:
        return self.disk.open(folder, name)

    def sync_folder(self, folder: Any) -> None:
        self.disk.sync_folder(folder)

    def locked(self, folder: Any) -> AbstractContextManager[None]:
        return self.disk.locked(folder)

    def leased(self, folder: Any, name: str) -> AbstractContextManager[None]:
        return self.disk.leased(folder, name)

    def between_leases(self, folder: Any, name: str) -> AbstractContextManager[None]:
        return self.disk.between_leases(folder, name)
