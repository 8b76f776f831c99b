"""A folder's metadata file: where it is, and the catalog in it. Reader and writer use it."""

from __future__ import annotations

import contextlib
import os
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import StorageMeta

from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.io.commit import metadata_name
from pytest_dcp._engine.io.disk import Disk, In
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp._engine.plan.hooks import is_overridden
from pytest_dcp._engine.storages.local_filesystem import FileSystem
from pytest_dcp.errors import CheckpointCorruptError


class FolderOfCheckpoint:
    """The folder of a reader or writer, and its metadata file."""

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
        if is_overridden(self, FolderOfCheckpoint, "_get_metadata_path"):
            path, name = split_path(self._get_metadata_path(rank))
            return Folder(disk, path), name
        return Folder(disk, self.path), metadata_name(rank)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the id is one of a local folder."""
        return FileSystem.validate_checkpoint_id(checkpoint_id)


def read_catalog(folder: Folder, name: str, limit: MemoryLimit = DEFAULT_LIMIT) -> Catalog:
    """The catalog of a metadata file.

    The chunks of a large one on a local disk are read when they are used: the file stays open
    until then, or until the catalog is dropped.

    Raises FileNotFoundError, and CheckpointCorruptError naming the file.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(folder.open(name))
        try:
            manifest = None
            if isinstance(file, LocalIn):
                manifest = metadata_file.open_pages(
                    file.read_into, file.size, file.stored_bytes, limit
                )
            if manifest is None:
                return _read_whole(file, limit)
        except CheckpointCorruptError as error:
            raise error.at(file=name) from error
        manifest.file = name
        manifest.on_complete = weakref.finalize(manifest, stack.pop_all().close)
        return manifest.catalog()


def _read_whole(file: In, limit: MemoryLimit) -> Catalog:
    reading = metadata_file.read_by_ranges(file.size, file.stored_bytes, limit)
    try:
        offset, nbytes = next(reading)
        while True:
            view = np.empty(nbytes, dtype=np.uint8).data
            offset, nbytes = reading.send(view[: file.read_into(offset, view)])
    except StopIteration as end:
        catalog: Catalog = end.value
        return catalog


def verify_metadata(folder: Folder, name: str) -> None:
    """Check the bytes of a metadata file that `read_catalog` does not read: those for torch.

    Raises FileNotFoundError, and CheckpointCorruptError naming the file.
    """
    with folder.open(name) as file:
        try:
            metadata_file.verify_pickle_of(file.read_into, file.size)
        except CheckpointCorruptError as error:
            raise error.at(file=name) from error


def files_named(folder: Folder, name: str) -> tuple[str, ...]:
    """The data files that a metadata file names."""
    return read_catalog(folder, name).places.files


def save_of(meta: StorageMeta | None) -> str | None:
    """Which save wrote the checkpoint, if it says so."""
    return None if meta is None else meta.save_id


def split_path(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """The folder and the name of a file, as a `Disk` takes them."""
    if isinstance(path, Path):
        return path.parent, path.name
    folder, _, name = os.fspath(path).rpartition("/")
    return folder, name


def new_id() -> str:
    """A new save id."""
    return uuid.uuid4().hex
