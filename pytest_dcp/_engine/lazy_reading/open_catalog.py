"""Opens the checkpoints that have a catalog: folders with metadata, safetensors files, folders of
them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.huggingface.folder import leased_name, read_files, read_settled
from pytest_dcp._engine.io.commit import metadata_name
from pytest_dcp._engine.io.read_copies import ReadSettings
from pytest_dcp._engine.lazy_reading.catalog_contents import CatalogContents
from pytest_dcp._engine.lazy_reading.locate import Location
from pytest_dcp._engine.storages.folder_metadata import read_catalog

TRIES = 5
"""No trainer saves so often that a commit falls into each of these openings."""


def open_catalog(location: Location, settings: ReadSettings, rank: int | None) -> CatalogContents:
    """The open checkpoint.

    rank: of the rank whose own checkpoint is opened, where each rank saved on its own.

    Raises CheckpointCorruptError naming the file, CheckpointReplacedError if saves replace the
    checkpoint again and again while it is opened.
    """
    find = _finder(location, settings, rank)
    index_name = metadata_name(rank) if location.format == "dcp" else None
    for _ in range(TRIES):
        with _lease(location, rank):
            contents = CatalogContents(location.folder, find(), settings, find, index_name)
        if not (contents.missing_files and contents.is_replaced()):
            return contents
        contents.close()
    raise contents.replaced_error()


def _finder(location: Location, settings: ReadSettings, rank: int | None) -> Callable[[], Catalog]:
    folder, file = location.folder, location.file
    if location.format == "dcp":
        return lambda: read_catalog(folder, metadata_name(rank), settings.memory)
    if file is not None:
        return lambda: read_files(folder, [file], settings.memory)
    return lambda: read_settled(lambda: folder, folder, settings.memory)


def _lease(location: Location, rank: int | None) -> AbstractContextManager[None]:
    """Holds off commits to the folder, if its storage can do that."""
    folder = location.folder
    if location.file is not None:
        return nullcontext()
    return folder.leased(metadata_name(rank) if location.format == "dcp" else leased_name(folder))
