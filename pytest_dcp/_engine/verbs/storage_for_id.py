"""The storage for a checkpoint id, a folder or a URL; and the id as ranks compare it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import Any

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from pytest_dcp._engine.coordinate import Subject
from pytest_dcp._engine.plan.storage_capabilities import place_of, shares_folder
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter

Id = str | os.PathLike[str] | None


def writer_for(storage: StorageWriter | None, checkpoint_id: Id) -> StorageWriter:
    """The storage to write to. `reset_to` sets a given storage to the id later."""
    if storage is not None:
        _check_storage(storage, "write_data", "storage_writer must be a StorageWriter")
        return storage
    path = _check_id(checkpoint_id, "storage_writer")
    if not _is_url(path):
        return FileSystemWriter(path)
    from pytest_dcp._engine.storages.fsspec import FsspecWriter

    _check_protocol(path, FsspecWriter, "storage_writer")
    return FsspecWriter(path)


def reset_to(storage: StorageWriter | None, checkpoint_id: Id) -> Callable[[], None] | None:
    """A function that sets a given storage to the id, if there is anything to set."""
    if storage is None or checkpoint_id is None:
        return None
    return partial(storage.reset, checkpoint_id)


def subject_of(storage: StorageWriter | StorageReader | None, checkpoint_id: Id) -> Subject | None:
    """The folder that an operation works on; None for a storage that may put ranks'
    files anywhere. Never raises.
    """
    if storage is not None and not shares_folder(storage):
        return None
    place = checkpoint_id or place_of(storage)
    try:
        if not place:
            return None
        name = os.fspath(place)
        if _is_url(place):
            return Subject(name, name)
        return Subject(os.path.abspath(name), os.path.realpath(name))
    except (TypeError, ValueError, OSError):
        return None


def reader_for(storage: StorageReader | None, checkpoint_id: Id, **options: Any) -> StorageReader:
    """The storage to read from, set to the id if one is given; only a new one takes the options."""
    if storage is not None:
        _check_storage(storage, "read_metadata", "storage_reader must be a StorageReader")
        if checkpoint_id is not None:
            storage.reset(checkpoint_id)
        return storage
    path = _check_id(checkpoint_id, "storage_reader")
    if not _is_url(path):
        return FileSystemReader(path, **options)
    from pytest_dcp._engine.storages.fsspec import FsspecReader

    _check_protocol(path, FsspecReader, "storage_reader")
    return FsspecReader(path, **options)


def _check_storage(storage: object, method: str, expected: str) -> None:
    """Raise TypeError unless it has the method: clients' storages need not be torch's class."""
    if not hasattr(storage, method):
        folder = "; a folder is passed as checkpoint_id=" if _names_a_folder(storage) else ""
        raise TypeError(f"{expected}, got {type(storage).__name__}{folder}")


def _names_a_folder(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _check_id(checkpoint_id: Any, argument: str) -> str | os.PathLike[str]:
    if checkpoint_id is not None and not _names_a_folder(checkpoint_id):
        kind = type(checkpoint_id).__name__
        raise TypeError(f"checkpoint_id must be a str or an os.PathLike, got {kind}")
    if not checkpoint_id:
        raise RuntimeError(
            f"`checkpoint_id` must be specified if {argument} is None: say which folder, "
            "by checkpoint_id="
        )
    path: str | os.PathLike[str] = checkpoint_id
    return path


def _is_url(checkpoint_id: str | os.PathLike[str]) -> bool:
    return not isinstance(checkpoint_id, PurePath) and "://" in os.fspath(checkpoint_id)


def _check_protocol(
    url: str | os.PathLike[str], kind: type[StorageReader] | type[StorageWriter], argument: str
) -> None:
    if not kind.validate_checkpoint_id(url):
        raise RuntimeError(
            f"Cannot detect which storage {os.fspath(url)!r} is: it is no local path, and fsspec "
            f"does not know its protocol. Please specify the {argument}."
        )
