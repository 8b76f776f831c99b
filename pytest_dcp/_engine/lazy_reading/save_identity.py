"""Distinguishes saves in the same place, for processes that open a checkpoint again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.storages.folder_metadata import save_of

FileIdentity = tuple[int, ...]
"""Changes if the file is written to: its size and time of modification."""


def identify_save(catalog: Catalog, times: Mapping[str, FileIdentity]) -> str:
    """A digest of the save's id, and of the files' names, places, checksums and times.

    times: of the files of the local disk that are kept open.
    """
    places = catalog.places
    facts = (save_of(catalog.storage_meta), places.files, sorted(times.items()))
    digest = hashlib.sha256(repr(facts).encode())
    for column in (places.start, places.length, places.sums):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
