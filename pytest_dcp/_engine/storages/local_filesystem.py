"""The local file system under torch's names, and how the engine accesses any file system."""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystem as TorchFileSystem
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import StorageMeta

from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.io.commit import metadata_name
from pytest_dcp._engine.io.disk import Disk
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.stream_disk import StreamDisk
from pytest_dcp._engine.plan.hooks import is_overridden
from pytest_dcp._engine.plan.storage_capabilities import has_disk
from pytest_dcp.errors import CheckpointCorruptError


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


def save_of(meta: StorageMeta | None) -> str | None:
    """Which save wrote the checkpoint, if it says so."""
    return None if meta is None else meta.save_id


def read_catalog(folder: Folder, name: str, limit: MemoryLimit = DEFAULT_LIMIT) -> Catalog:
    """The catalog of a metadata file.

    Raises FileNotFoundError, and CheckpointCorruptError naming the file.
    """
    with folder.open(name) as file:
        reading = metadata_file.read_by_ranges(file.size, file.stored_bytes, limit)
        try:
            offset, nbytes = next(reading)
            while True:
                view = np.empty(nbytes, dtype=np.uint8).data
                offset, nbytes = reading.send(view[: file.read_into(offset, view)])
        except StopIteration as end:
            catalog: Catalog = end.value
            return catalog
        except CheckpointCorruptError as error:
            raise error.at(file=name) from error


def split_path(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The folder and the name of a file, as a `Disk` takes them."""
    if isinstance(path, Path):
        return path.parent, path.name
    folder, _, name = os.fspath(path).rpartition("/")
    return folder, name


class MetadataPlace:
    """Where a reader or writer of folders has its metadata file."""

    fs: FileSystemBase
    path: str | os.PathLike[str]
    shares_folder = True
    """Every rank must name the same folder."""

    def _get_metadata_path(self, rank: int | None = None) -> str | os.PathLike[str]:
        """The metadata file of the whole checkpoint, or of one rank: torch's hook, for
        subclasses."""
        return self.fs.concat_path(self.path, metadata_name(rank))

    def _metadata_place(self, disk: Disk, rank: int | None) -> tuple[Folder, str]:
        """The folder and the name of the metadata file."""
        if is_overridden(self, MetadataPlace, "_get_metadata_path"):
            path, name = split_path(self._get_metadata_path(rank))
            return Folder(disk, path), name
        return Folder(disk, self.path), metadata_name(rank)


def files_named(folder: Folder, name: str) -> tuple[str, ...]:
    return read_catalog(folder, name).places.files


def new_id() -> str:
    return uuid.uuid4().hex
