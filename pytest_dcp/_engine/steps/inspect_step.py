"""Is a step's checkpoint whole? By its index and its files' sizes, or by every byte's checksum."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import numpy as np

from pytest_dcp._engine.format.catalog import EntryPlaces
from pytest_dcp._engine.format.shared_names import why_missing
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.open_checkpoint import open_checkpoint
from pytest_dcp._engine.storages.folder_metadata import read_catalog
from pytest_dcp.errors import CheckpointError, UntrustedPickleError

CheckLevel = Literal["sizes", "checksums"]
ListLevel = Literal["names", "sizes", "checksums"]
NOT_ENDED = f"it has no {METADATA}: its save has not ended"


def find_problem(
    folder: Folder, checkpoint_id: Any, level: ListLevel, storage_options: Mapping[str, Any]
) -> str | None:
    """Why a checkpoint is not whole, in words; None if nothing is wrong with it.

    level: "names": it has an index, which is not opened; "sizes": the index is undamaged, and each
    file that it names is there and long enough; "checksums": every byte is read and checked, too.

    An OSError about anything else than a missing file is raised: it says nothing about the
    checkpoint.
    """
    try:
        if level == "names":
            return None if folder.exists(METADATA) else NOT_ENDED
        places = read_catalog(folder, METADATA).places
        problem = _problem_of_files(folder, places)
        if problem is None and level == "checksums":
            _read_all(checkpoint_id, storage_options)
    except FileNotFoundError:
        return NOT_ENDED
    except CheckpointError as error:
        return str(error)
    return problem


def _problem_of_files(folder: Folder, places: EntryPlaces) -> str | None:
    stored = places.file >= 0
    needed = np.zeros(len(places.files), dtype=np.int64)
    np.maximum.at(needed, places.file[stored], (places.start + places.length)[stored])
    for name, nbytes in zip(places.files, needed.tolist(), strict=True):
        try:
            with folder.open(name) as file:
                size = file.size
        except FileNotFoundError:
            return f"{name} is missing{why_missing(name)}"
        if size < nbytes:
            return f"{name} has {size} bytes of at least {nbytes}"
    return None


def _read_all(checkpoint_id: Any, storage_options: Mapping[str, Any]) -> None:
    with open_checkpoint(
        checkpoint_id, verify="full", storage_options=storage_options
    ) as checkpoint:
        for lazy in checkpoint.values():
            if isinstance(lazy, LazyTensor):
                lazy.tensor()
                continue
            with suppress(UntrustedPickleError):  # Its bytes were checked before.
                lazy.value()
