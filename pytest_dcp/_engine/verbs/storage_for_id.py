"""The storage for a checkpoint id, a folder or a URL; and the id as ranks compare it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from pytest_dcp._engine.coordinate import Subject
from pytest_dcp._engine.plan.storage_capabilities import place_of, shares_folder
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.storages.storage_options import check_storage_options, is_url

Id = str | os.PathLike[str] | None


def writer_for(
    storage: StorageWriter | None,
    checkpoint_id: Id,
    storage_options: Mapping[str, Any] | None = None,
) -> StorageWriter:
    """The storage to write to. `reset_to` sets a given storage to the id later."""
    if storage is not None:
        _refuse_options(storage_options, storage, "FsspecWriter")
        _check_storage(storage, "write_data", "storage_writer must be a StorageWriter")
        return storage
    path = _check_id(checkpoint_id, "storage_writer")
    own_options = check_storage_options(storage_options, path)
    if not is_url(path):
        return FileSystemWriter(path)
    from pytest_dcp._engine.storages.fsspec import FsspecWriter

    _check_protocol(path, FsspecWriter, "storage_writer")
    return FsspecWriter(path, storage_options=own_options)


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
        if is_url(place):
            return Subject(name, name)
        return Subject(os.path.abspath(name), os.path.realpath(name))
    except (TypeError, ValueError, OSError):
        return None


def reader_for(
    storage: StorageReader | None,
    checkpoint_id: Id,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> StorageReader:
    """The storage to read from, set to the id if one is given; only a new one takes the options.

    storage_options: of a URL's file system. options: of the reader.
    """
    if storage is not None:
        _refuse_options(storage_options, storage, "FsspecReader")
        _check_storage(storage, "read_metadata", "storage_reader must be a StorageReader")
        if checkpoint_id is not None:
            storage.reset(checkpoint_id)
        return storage
    path = _check_id(checkpoint_id, "storage_reader")
    own_options = check_storage_options(storage_options, path)
    if not is_url(path):
        return FileSystemReader(path, **options)
    from pytest_dcp._engine.storages.fsspec import FsspecReader

    _check_protocol(path, FsspecReader, "storage_reader")
    return FsspecReader(path, storage_options=own_options, **options)


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


def _refuse_options(options: Mapping[str, Any] | None, storage: object, ours: str) -> None:
    """Raise ValueError for options beside a storage, which has its own."""
    if options:
        raise ValueError(
            "storage_options are for the storage that checkpoint_id chooses, and a "
            f"{type(storage).__name__} was given: give them to it ({ours} takes storage_options)"
        )


def _check_protocol(
    url: str | os.PathLike[str], kind: type[StorageReader] | type[StorageWriter], argument: str
) -> None:
    if not kind.validate_checkpoint_id(url):
        raise RuntimeError(
            f"Cannot detect which storage {os.fspath(url)!r} is: it is no local path, and fsspec "
            f"does not know its protocol. Please specify the {argument}."
        )
