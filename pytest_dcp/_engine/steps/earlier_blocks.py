"""The blocks of an earlier step that a new step can refer to.

A block fits if the earlier step has a chunk of the same dtype, shape and length whose checksums and
strong hash are those of the new data. The checksums are compared one by one as well, so the sums
that the new step's index holds are true of its own data: should the earlier index lie about a
hash, a load of the new step finds the difference.

Rules inside: only files are considered that are part of the new step already (the coordinator has
linked them, or entered them in the ledger; see `file_sharing`), have names that a save makes, and
are long enough for every chunk that the earlier index places in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.block_hashes import BlockHashes
from pytest_dcp._engine.format.catalog import BLOCK_BYTES, Catalog, EntryPlaces
from pytest_dcp._engine.format.entry import tensor_frame
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.steps.block_hash import Data, first_sum, sum_and_hash
from pytest_dcp._engine.steps.file_sharing import FileSharing
from pytest_dcp._engine.storages.folder_metadata import read_catalog, save_of
from pytest_dcp.errors import CheckpointError

BlockKind = tuple[Any, ...]
"""dtype, shape, bytes, first checksum."""


@dataclass(frozen=True, slots=True)
class EarlierStep:
    """Names the step whose blocks a save may refer to. All ranks get it from the coordinator."""

    folder: Folder
    save_id: str
    since_full: int
    """See `BlockHashes`."""

    def read_index(self) -> tuple[Catalog, BlockHashes] | None:
        """The step's index; None if this rank does not find that very step: it is no loss."""
        try:
            catalog = read_catalog(self.folder, METADATA)
        except (OSError, CheckpointError):
            return None
        hashes = BlockHashes.of_catalog(catalog)
        if hashes is None or save_of(catalog.storage_meta) != self.save_id:
            return None
        return catalog, hashes


def needed_bytes(places: EntryPlaces) -> dict[str, int]:
    """How long each file must be to hold the chunks in it."""
    stored = places.file >= 0
    needed = np.zeros(len(places.files), dtype=np.int64)
    np.maximum.at(needed, places.file[stored], (places.start + places.length)[stored])
    return dict(zip(places.files, needed.tolist(), strict=True))


def shareable_files(places: EntryPlaces, sharing: FileSharing) -> dict[str, int]:
    """The files of a step that another may share, and the bytes that each must have."""
    needed = needed_bytes(places)
    return {name: nbytes for name, nbytes in needed.items() if sharing.is_shareable(name)}


class EarlierBlocks:
    """The chunks of an earlier step, found by their data."""

    def __init__(
        self, catalog: Catalog, hashes: BlockHashes, folder: Folder, sharing: FileSharing
    ) -> None:
        """folder: of the new step; only files that can be opened from there are considered."""
        self._index = catalog.index
        self.places = catalog.places
        self.hashes = hashes
        self.file_bytes = _sizes_in(folder, shareable_files(catalog.places, sharing))
        """The sizes of the files that can be referred to."""
        self._rows = _rows_by_kind(catalog, hashes, self.file_bytes)

    def find(self, data: Data, copy_bytes: int) -> tuple[int | None, bytes | None]:
        """The row of the chunk that holds this data, and the data's hash if it was computed.

        Data that differs in the first 64 KiB costs no more than a checksum of these.
        """
        kind = _kind_of(data)
        rows = self._rows.get((*kind, first_sum(data)), []) if kind[-1] else []
        if not rows:
            return None, None
        sums, digest = sum_and_hash(data, self.hashes.hash_name, copy_bytes)
        found = np.array(sums, dtype=np.uint32)
        places, digests = self.places, self.hashes.digests
        for row in rows:
            theirs = places.sums[places.first_sum[row] : places.first_sum[row + 1]]
            if digests[row].tobytes() == digest and np.array_equal(theirs, found):
                return row, digest
        return None, digest

    def file_of(self, row: int) -> str:
        """The file that a chunk is in."""
        name: str = self.places.files[self.places.file[row]]
        return name

    def entries_of(self, rows: Iterable[int]) -> dict[int, tuple[str, int]]:
        """The file of each of these chunks, and the bytes of its entry."""
        return {row: (self.file_of(row), int(self.places.length[row])) for row in rows}

    def tensor_bytes(self, row: int) -> int:
        """The bytes of a tensor's data; 0 for a value, whose size no plan knows."""
        index = self._index
        return int(self.places.data_nbytes[row]) if index.ndim[index.key_of[row]] >= 0 else 0


def _kind_of(data: Data) -> BlockKind:
    """dtype, shape and bytes of a block."""
    if isinstance(data, torch.Tensor):
        return data.dtype, tuple(data.shape), data.numel() * data.itemsize
    return None, None, len(data)


def _sizes_in(folder: Folder, needed: dict[str, int]) -> dict[str, int]:
    """The sizes of the files that are in the folder and long enough."""
    sizes: dict[str, int] = {}
    for name, nbytes in needed.items():
        try:
            with folder.open(name) as file:
                size = file.size
        except (OSError, CheckpointError):
            continue
        if size >= nbytes:
            sizes[name] = size
    return sizes


def _rows_by_kind(
    catalog: Catalog, hashes: BlockHashes, file_bytes: dict[str, int]
) -> dict[BlockKind, list[int]]:
    """The rows that can be referred to, by the kind of the chunk and its first checksum."""
    index, places = catalog.index, catalog.places
    rows: dict[BlockKind, list[int]] = defaultdict(list)
    if places.block_bytes != BLOCK_BYTES:
        return rows
    here = np.array([name in file_bytes for name in places.files], dtype=bool)
    counts = np.diff(places.first_sum)
    usable = (places.file >= 0) & (counts > 0) & (places.data_start >= 0)
    usable[usable] &= here[places.file[usable]]
    usable &= hashes.digests.any(axis=1)
    usable[list(places.transforms)] = False
    for row in np.flatnonzero(usable).tolist():
        key = int(index.key_of[row])
        ndim = int(index.ndim[key])
        nbytes, first = int(places.data_nbytes[row]), int(places.sums[places.first_sum[row]])
        lead = int(places.data_start[row] - places.start[row])
        length = int(places.length[row])
        if ndim < 0:
            if (lead, length) == (0, nbytes):
                rows[None, None, nbytes, first].append(row)
            continue
        dtype = index.properties[index.property_of[key]].dtype
        shape = tuple(index.shape[row, :ndim].tolist())
        if _is_framed(dtype, shape, lead, length):
            rows[dtype, shape, nbytes, first].append(row)
    return rows


def _is_framed(dtype: torch.dtype, shape: tuple[int, ...], lead: int, length: int) -> bool:
    """Whether an entry of such a tensor has its data there: torch's other forms differ."""
    try:
        frame = tensor_frame(dtype, shape)
    except (TypeError, ValueError):
        return False
    return (len(frame.head), frame.length) == (lead, length)
