"""The local file system under torch's names, and how the engine accesses any file system."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import cast

from torch.distributed.checkpoint.filesystem import FileSystem as TorchFileSystem
from torch.distributed.checkpoint.filesystem import FileSystemBase

from pytest_dcp._engine.io.disk import Disk
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.stream_disk import StreamDisk
from pytest_dcp._engine.plan.storage_capabilities import has_disk


class FileSystem(FileSystemBase):
    """The local file system."""

    def __init__(self, *, follow_links: bool = False) -> None:
        """follow_links: whether a link in a checkpoint may lead to a plain file outside it."""
        super().__init__()
        self.follow_links = follow_links

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[IOBase, None, None]:
        with Path(path).open(mode) as stream:
            yield cast(IOBase, stream)

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str | os.PathLike[str]:
        return Path(path) / suffix

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return Path(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        Path(path).replace(new_path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the id can be a local path: it exists, or its parent can be one."""
        if isinstance(checkpoint_id, Path):
            return True
        if "://" in str(checkpoint_id):
            return False
        above = [Path(checkpoint_id), *Path(checkpoint_id).parents]
        return any(p.exists() and os.access(p, os.W_OK) for p in above)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return Path(path).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink()

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(entry) for entry in Path(path).iterdir()]


def disk_of(fs: FileSystemBase) -> Disk:
    """How the engine accesses this file system: by descriptors if it is local.

    A class with a better way than its streams has it as `disk`; a wrapper around such an object
    must not be bypassed.
    """
    if type(fs) in (FileSystem, TorchFileSystem):
        return LocalDisk(follow_links=isinstance(fs, FileSystem) and fs.follow_links)
    if has_disk(fs):
        own: Disk = fs.disk
        return own
    return StreamDisk(fs)
