"""A folder on a disk: one value for the pair that most functions of storage need.

>>> from pathlib import Path
>>> from pytest_dcp._engine.io.local_disk import LocalDisk
>>> folder = Folder(LocalDisk(), Path("step-1"))
>>> _ = folder.make()
>>> with folder.create("weights.tmp") as out:
...     out.write([b"1 2 ", b"3"])
>>> folder.replace("weights.tmp", "weights")
>>> folder.names(), folder.exists("weights.tmp")
(['weights'], False)
>>> with folder.open("weights") as file:
...     file.size
5
>>> print(folder)
step-1
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_dcp._engine.io.disk import Disk, In, Out


@dataclass(frozen=True, slots=True)
class Folder:
    """The operations of a `Disk` on one folder. `Disk` says what each promises, and its errors."""

    disk: Disk
    path: Any
    """As the disk takes it: a Path on a local disk, a str elsewhere."""

    def __str__(self) -> str:
        return str(self.path)

    def below(self, name: str) -> Folder:
        """The folder of this name in it."""
        path = self.path
        is_path = isinstance(path, Path)
        return Folder(self.disk, path / name if is_path else f"{str(path).rstrip('/')}/{name}")

    def make(self) -> Sequence[Any]:
        """Make the folder and its missing parents; returns the folders to sync, innermost first."""
        return self.disk.make_folder(self.path)

    def names(self) -> list[str]:
        """Names of its entries; empty if it does not exist."""
        return self.disk.names(self.path)

    def exists(self, name: str) -> bool:
        """Whether it has a file of this name."""
        return self.disk.exists(self.path, name)

    def create(self, name: str) -> AbstractContextManager[Out]:
        """A new file of this name. An existing one is replaced."""
        return self.disk.create(self.path, name)

    def open(self, name: str) -> AbstractContextManager[In]:
        """The file of this name, to read. Raises FileNotFoundError or CheckpointCorruptError."""
        return self.disk.open(self.path, name)

    def replace(self, old: str, new: str) -> None:
        """Rename a file."""
        self.disk.replace(self.path, old, new)

    def remove(self, name: str) -> None:
        """Remove a file; does nothing if it is gone."""
        self.disk.remove(self.path, name)

    def sync(self) -> None:
        """Return once its names are on stable storage."""
        self.disk.sync_folder(self.path)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other saves' commits out, if the storage can."""
        return self.disk.locked(self.path)

    def leased(self, name: str) -> AbstractContextManager[None]:
        """Keep a commit from replacing this file for a while, if the storage can."""
        return self.disk.leased(self.path, name)

    def between_leases(self, name: str) -> AbstractContextManager[None]:
        """Replace this file inside: its readers have released it, or their time is up."""
        return self.disk.between_leases(self.path, name)
