"""The catalog of a checkpoint: its contents (an index) and where each chunk's bytes are.

A catalog is the content of a committed `.metadata`. `Catalog.metadata` shows it as torch's
`Metadata`, whose mappings are made on demand; `Catalog.of` reads any `Metadata` back.

Two ranks have saved halves of a 4x2 tensor `w`, each in its own file:

>>> import torch
>>> from torch.distributed.checkpoint.metadata import TensorProperties
>>> from pytest_dcp._engine.plan.boxes import pad_rows
>>> index = Index(
...     fqns=("w",), property_of=np.array([0]), properties=(TensorProperties(torch.float32),),
...     ndim=np.array([2]), size=pad_rows([(4, 2)], 2, 1), first=np.array([0, 2]),
...     offset=pad_rows([(0, 0), (2, 0)], 2, 0), shape=pad_rows([(2, 2), (2, 2)], 2, 1))
>>> places = replace(
...     EntryPlaces.nowhere(2), files=("__0_0.distcp", "__1_0.distcp"), file=np.array([0, 1]),
...     start=np.array([0, 0]), length=np.array([900, 900]))
>>> catalog = Catalog(index, places)

Code written for torch sees an ordinary Metadata:

>>> metadata = catalog.metadata()
>>> metadata.state_dict_metadata["w"].size
torch.Size([4, 2])
>>> metadata.storage_data[MetadataIndex("w", [2, 0])].relative_path
'__1_0.distcp'

The way back costs nothing if the client has changed nothing, and picks up its changes otherwise:

>>> Catalog.of(metadata).places is places
True
>>> metadata.storage_data[MetadataIndex("w", [2, 0])].relative_path = "moved.distcp"
>>> Catalog.of(metadata).places.files
('__0_0.distcp', 'moved.distcp')
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from pytest_dcp._engine.plan.boxes import Ints, row_bounds, spans
from pytest_dcp._engine.plan.column_table import ColumnTable
from pytest_dcp._engine.plan.columns import UNKNOWN
from pytest_dcp._engine.plan.index import Index, KeyTable, copy_metadata, further_fields, index_of
from pytest_dcp._engine.plan.lazy_containers import LazyDict
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo

BLOCK_BYTES = 1 << 16
"""A checksum every 64 KiB: 4 bytes in 65,536. Blocks are small enough that a shard's ragged ends
can be extended to whole blocks, and large enough that looping over them costs less than the
hashing."""


@dataclass(frozen=True, eq=False)
class EntryPlaces(ColumnTable):
    """Where the chunks of an index are stored, one row per chunk, in the index's order."""

    files: tuple[str, ...]
    """Relative to the checkpoint's folder."""
    file: NDArray[np.int32]
    """Positions in `files`; -1: the chunk has no entry."""
    start: Ints
    """Bytes from the file's start to the entry."""
    length: Ints
    """Bytes of the entry."""
    data_start: Ints
    """Bytes from the file's start to the tensor's data, row-major; -1: the entry must be parsed."""
    data_nbytes: Ints
    """Of the tensor's data, or of a byte value's whole entry; -1 where `data_start` is."""
    first_sum: Ints
    """(chunks + 1,) the sums of chunk i are first_sum[i] to first_sum[i + 1] - 1; none: no sums."""
    sums: NDArray[np.uint32]
    """CRC-32 of the data from its first byte to the end of each block of `block_bytes`: the state
    before a block and the one after it check that block alone; the last is the data's own CRC."""
    block_bytes: int = BLOCK_BYTES
    transforms: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Descriptors of the stream transforms of a chunk's entry, for the rows that have any."""

    @classmethod
    def nowhere(cls, chunks: int) -> EntryPlaces:
        """Rows for chunks that are not stored yet."""
        none = np.full(chunks, UNKNOWN, dtype=np.int64)
        return cls(
            files=(),
            file=none.astype(np.int32),
            start=none,
            length=none,
            data_start=none,
            data_nbytes=none,
            first_sum=np.zeros(chunks + 1, dtype=np.int64),
            sums=np.zeros(0, dtype=np.uint32),
        )

    def without_sums(self) -> EntryPlaces:
        """The places alone."""
        none, first = np.zeros(0, dtype=np.uint32), np.zeros_like(self.first_sum)
        return replace(self, first_sum=first, sums=none)


@dataclass(frozen=True, eq=False)
class Catalog:
    """The contents of a checkpoint, their places, and the data of its planner and storage."""

    index: Index
    places: EntryPlaces
    planner_data: Any = None
    storage_meta: StorageMeta | None = None
    version: str | None = None
    further: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that a planner or a framework has set on the Metadata, by name."""
    beside: Mapping[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    """Places of items that a client wrote although the index lacks them, for clients that look them
    up."""

    def metadata(self) -> Metadata:
        """This catalog as torch's object; its mappings make their values on demand."""
        table = EntryTable(self)
        for key, place in self.beside.items():
            table[key] = place
        metadata = Metadata(
            state_dict_metadata=KeyTable(self.index),
            planner_data=self.planner_data,
            storage_data=table,
            storage_meta=self.storage_meta,
            version=self.version,
        )
        return copy_metadata(metadata, **self.further) if self.further else metadata

    @cached_property
    def row_of(self) -> dict[MetadataIndex, int]:
        """The chunk row of each of torch's keys."""
        index = self.index
        return {index_key(index, row): row for row in range(len(index.key_of))}

    @classmethod
    def of(cls, metadata: Metadata) -> Catalog:
        """The catalog of any metadata with `_StorageInfo` places."""
        table = metadata.storage_data
        index = index_of(metadata)
        if isinstance(table, EntryTable) and table.catalog.index is index and table.is_untouched():
            places = table.catalog.places
        else:
            places = _places_of(index, table) if table else EntryPlaces.nowhere(len(index.offset))
        return cls(
            index,
            places,
            metadata.planner_data,
            metadata.storage_meta,
            getattr(metadata, "version", None),
            further_fields(metadata),
            table.catalog.beside if isinstance(table, EntryTable) else {},
        )


class EntryTable(LazyDict[MetadataIndex, _StorageInfo]):
    """`Metadata.storage_data` over a catalog."""

    __slots__ = ("_keys", "_origins", "catalog")

    def __init__(self, catalog: Catalog) -> None:
        super().__init__()
        self.catalog = catalog
        """The source of the table, even if it was changed since."""
        self._keys: Collection[MetadataIndex] | None = None
        self._origins: dict[int, tuple[_StorageInfo, int]] = {}

    def lazy_keys(self) -> Collection[MetadataIndex]:
        if self._keys is None:
            rows = self.catalog.row_of
            placed = self.catalog.places.file >= 0
            whole = bool(placed.all())
            self._keys = rows.keys() if whole else {k: r for k, r in rows.items() if placed[r]}
        return self._keys

    def make_value(self, key: MetadataIndex) -> _StorageInfo:
        row = self.catalog.row_of[key]
        if self.catalog.places.file[row] < 0:
            raise KeyError(key)
        info = info_of(self.catalog.places, row)
        self._origins[id(info)] = info, row
        return info

    def origin_of(self, info: _StorageInfo) -> int | None:
        """The row that a place of this table was made from, unless the place has been changed."""
        original, row = self._origins.get(id(info), (None, -1))
        same = original is info and info == info_of(self.catalog.places, row)
        return row if same else None

    def is_untouched(self) -> bool:
        """Whether these are still the catalog's places, under the catalog's keys."""
        items = self.made_items()
        if not items and not self.is_full:
            return True  # without the keys, which take as long to make as a plan
        rows = self.catalog.row_of
        if self.is_full and len(self) != int((self.catalog.places.file >= 0).sum()):
            return False
        return all(key in rows and self.origin_of(info) == rows[key] for key, info in items)


def info_of(places: EntryPlaces, row: int) -> _StorageInfo:
    """A chunk's place as torch's object."""
    transforms = places.transforms.get(row)
    return _StorageInfo(
        relative_path=places.files[places.file[row]],
        offset=int(places.start[row]),
        length=int(places.length[row]),
        transform_descriptors=None if transforms is None else list(transforms),
    )


def index_key(index: Index, row: int) -> MetadataIndex:
    """Torch's key of a chunk: its name, and its offset unless it is a byte value."""
    key = index.key_of[row]
    ndim = int(index.ndim[key])
    offset = None if ndim < 0 else index.offset[row, :ndim].tolist()
    hint = None if ndim < 0 else int(row - index.first[key])
    return MetadataIndex(index.fqns[key], offset, hint)


def _places_of(index: Index, table: Mapping[MetadataIndex, _StorageInfo]) -> EntryPlaces:
    """The places that torch's mapping names.

    If places come from a catalog and only their keys differ, the catalog's further facts about
    their bytes are kept.
    """
    chunks = len(index.offset)
    # The fields that determine equality of torch's keys; building a key per row would take longer
    # than everything else.
    found: dict[tuple[str, tuple[int, ...] | None], _StorageInfo] = {
        (key.fqn, key.offset): info for key, info in table.items()
    }
    fqns, ndim = index.fqns, index.ndim.tolist()
    infos = [
        found.get((fqns[key], tuple(offset[: ndim[key]]) if ndim[key] >= 0 else None))
        for key, offset in zip(index.key_of.tolist(), index.offset.tolist(), strict=True)
    ]
    infos = [info if hasattr(info, "relative_path") else None for info in infos]
    files: dict[str, int] = {}
    for info in infos:
        if info is not None:
            files.setdefault(info.relative_path, len(files))
    transforms: dict[int, tuple[str, ...]] = {}
    for row, info in enumerate(infos):
        # Checkpoints of torch before 2.6 lack the attribute.
        descriptors: Sequence[str] | None = getattr(info, "transform_descriptors", None)
        if descriptors:
            transforms[row] = tuple(descriptors)
    bare = replace(
        EntryPlaces.nowhere(chunks),
        files=tuple(files),
        file=np.array([-1 if i is None else files[i.relative_path] for i in infos], dtype=np.int32),
        start=np.array([-1 if i is None else i.offset for i in infos], dtype=np.int64),
        length=np.array([-1 if i is None else i.length for i in infos], dtype=np.int64),
        transforms=transforms,
    )
    return _with_known_data(bare, infos, table) if isinstance(table, EntryTable) else bare


def _with_known_data(
    bare: EntryPlaces, infos: Sequence[_StorageInfo | None], table: EntryTable
) -> EntryPlaces:
    """The places, with the data's start and sums for entries that are still the table's own."""
    old_places = table.catalog.places
    origin = [None if info is None else table.origin_of(info) for info in infos]
    row = np.array([-1 if at is None else at for at in origin], dtype=np.int64)
    here = np.flatnonzero(row >= 0)
    counts = np.zeros(len(row), dtype=np.int64)
    counts[here] = np.diff(old_places.first_sum)[row[here]]
    data_start, data_nbytes = bare.data_start.copy(), bare.data_nbytes.copy()
    data_start[here], data_nbytes[here] = (
        old_places.data_start[row[here]],
        old_places.data_nbytes[row[here]],
    )
    sums = np.repeat(old_places.first_sum[row[here]], counts[here]) + spans(counts[here])
    return replace(
        bare,
        data_start=data_start,
        data_nbytes=data_nbytes,
        first_sum=row_bounds(counts),
        sums=old_places.sums[sums],
        block_bytes=old_places.block_bytes,
    )
