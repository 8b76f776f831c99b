"""The contents of a checkpoint, as columns that look like torch's metadata.

An `Index` is a table of keys and a table of chunks (the stored boxes; the chunks of a key are
adjacent rows). `Metadata.state_dict_metadata` is a `KeyTable`: a mapping that makes torch's objects
on demand. A change made through it turns it into a plain dict, and `index_of` then reads the
objects again, so that no planner's edit is lost.

>>> chunks = [ChunkStorageMetadata(torch.Size([r, 0]), torch.Size([2, 2])) for r in (0, 2)]
>>> w = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([4, 2]), chunks)
>>> index = Index.of({"w": w, "step": BytesStorageMetadata()})
>>> index.first.tolist(), index.ndim.tolist()  # `w` has the chunks 0 and 1, `step` the chunk 2
([0, 2, 3], [2, -1])
>>> metadata = Metadata(KeyTable(index))
>>> metadata.state_dict_metadata["w"].chunks[1]
ChunkStorageMetadata(offsets=torch.Size([2, 0]), sizes=torch.Size([2, 2]))
>>> index_of(metadata) is index
True
>>> metadata.state_dict_metadata["w"].chunks.pop()
ChunkStorageMetadata(offsets=torch.Size([2, 0]), sizes=torch.Size([2, 2]))
>>> index_of(metadata).first.tolist()
[0, 1, 2]
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.plan.boxes import Ints, pad_rows, row_bounds
from pytest_dcp._engine.plan.column_table import ColumnTable
from pytest_dcp._engine.plan.columns import UNKNOWN, number_properties, size_of
from pytest_dcp._engine.plan.lazy_containers import LazyDict, LazyList
from pytest_dcp._engine.plan.packed_names import Fqns


@dataclass(frozen=True, eq=False)
class Index(ColumnTable):
    """n keys and their chunks. A byte value is one chunk of no dimensions."""

    fqns: Fqns
    property_of: NDArray[np.int32]
    """(n,) positions in `properties`; -1 for a byte value."""
    properties: tuple[TensorProperties, ...]
    ndim: NDArray[np.int16]
    """(n,) dimensions; -1 for a byte value."""
    size: Ints
    """(n, k) the full tensors, padded with 1."""
    first: Ints
    """(n + 1,) chunks of key i are the rows first[i] to first[i + 1] - 1."""
    offset: Ints
    """(chunks, k), padded with 0."""
    shape: Ints
    """(chunks, k), padded with 1."""

    def __len__(self) -> int:
        return len(self.fqns)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each key."""
        return {fqn: row for row, fqn in enumerate(self.fqns)}

    def find_row(self, fqn: str) -> int | None:
        """The row of a key; None if there is none of this name."""
        return self.row_of.get(fqn)

    def names_at(self, rows: Ints) -> Fqns:
        """The names of these keys."""
        return tuple(map(self.fqns.__getitem__, rows.tolist()))

    @cached_property
    def key_of(self) -> Ints:
        """(chunks,) the key that each chunk belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @cached_property
    def itemsize(self) -> Ints:
        """(n,) bytes of an element; 1 for byte values."""
        widths = [p.dtype.itemsize for p in self.properties]
        return np.array([*widths, 1], dtype=np.int64)[self.property_of]

    def value(self, row: int) -> STORAGE_TYPES:
        """The key's metadata as torch's object."""
        ndim = int(self.ndim[row])
        if ndim < 0:
            return BytesStorageMetadata()
        chunks: Any = ChunkList(self, row)
        properties = replace(self.properties[self.property_of[row]])
        return TensorStorageMetadata(properties, size_of(self.size[row], ndim), chunks)

    def chunk(self, row: int) -> ChunkStorageMetadata:
        """A chunk, by its row, as torch's object."""
        ndim = int(self.ndim[self.key_of[row]])
        return ChunkStorageMetadata(size_of(self.offset[row], ndim), size_of(self.shape[row], ndim))

    @classmethod
    def of(cls, keys: Mapping[str, STORAGE_TYPES]) -> Index:
        """The columns of any mapping of torch's objects."""
        values = list(keys.values())
        tensors = [v if isinstance(v, TensorStorageMetadata) else None for v in values]
        property_numbers: dict[Any, int] = {}
        chunks = [[None] if t is None else list(t.chunks) for t in tensors]
        # A value counts as one chunk without dimensions: entries of both kinds have one table.
        flat = [chunk for some in chunks for chunk in some]
        rank = max((len(t.size) for t in tensors if t is not None), default=0)
        counts = np.array([len(some) for some in chunks], dtype=np.int64)
        return cls(
            fqns=tuple(keys),
            property_of=np.array(
                [
                    UNKNOWN if t is None else number_properties(property_numbers, t.properties)
                    for t in tensors
                ],
                dtype=np.int32,
            ),
            properties=tuple(TensorProperties(*key) for key in property_numbers),
            ndim=np.array([UNKNOWN if t is None else len(t.size) for t in tensors], dtype=np.int16),
            size=pad_rows([() if t is None else t.size for t in tensors], rank, 1),
            first=row_bounds(counts),
            offset=pad_rows([() if c is None else c.offsets for c in flat], rank, 0),
            shape=pad_rows([() if c is None else c.sizes for c in flat], rank, 1),
        )


class ChunkList(LazyList[ChunkStorageMetadata]):
    """The chunks of one key: rows of an index until they are changed, then a list."""

    __slots__ = ("_index", "_start", "_stop")

    def __init__(self, index: Index, row: int) -> None:
        super().__init__()
        self._index = index
        self._start, self._stop = int(index.first[row]), int(index.first[row + 1])

    def lazy_len(self) -> int:
        return self._stop - self._start

    def make_item(self, at: int) -> ChunkStorageMetadata:
        return self._index.chunk(self._start + at)

    def is_untouched(self, index: Index, row: int) -> bool:
        """Whether these are still the chunks of that key of that index."""
        return (
            self._index is index
            and self._start == index.first[row]
            and len(self) == self._stop - self._start
            and all(chunk == index.chunk(self._start + at) for at, chunk in self.made_items())
        )


class KeyTable(LazyDict[str, STORAGE_TYPES]):
    """`Metadata.state_dict_metadata` over an index: values are made on demand."""

    __slots__ = ("source",)

    def __init__(self, index: Index) -> None:
        super().__init__()
        self.source = index
        """The source of the table, even if it was changed since."""

    def lazy_keys(self) -> Collection[str]:
        return self.source.row_of.keys()

    def make_value(self, key: str) -> STORAGE_TYPES:
        return self.source.value(self.source.row_of[key])

    def index(self) -> Index | None:
        """The index, or None if a key or a value has been changed."""
        index = self.source
        if self.is_full and list(self) != list(index.fqns):
            return None
        return index if all(_is_unchanged(index, *pair) for pair in self.made_items()) else None

    def stated_size(self, fqn: str) -> torch.Size | None:
        """The size that the index has for a tensor, even if the table was changed since."""
        row = self.source.row_of.get(fqn)
        if row is None or self.source.ndim[row] < 0:
            return None
        return size_of(self.source.size[row], int(self.source.ndim[row]))


def stated_sizes(metadata: Metadata | None) -> Mapping[str, torch.Size]:
    """The sizes of the tensors, where the metadata are another storage's own objects."""
    keys = None if metadata is None else metadata.state_dict_metadata
    if keys is None or isinstance(keys, KeyTable):
        return {}
    return {fqn: v.size for fqn, v in keys.items() if isinstance(v, TensorStorageMetadata)}


def resized_keys(metadata: Metadata, before: Mapping[str, torch.Size]) -> frozenset[str]:
    """The keys whose size has been changed since the metadata was read.

    before: the sizes at that time, if the metadata is not the engine's.
    """
    keys = metadata.state_dict_metadata
    table = keys if isinstance(keys, KeyTable) else None
    if table is None and not before:
        return frozenset()
    resized = set()
    for fqn, value in keys.items() if table is None else table.made_items():
        was = before.get(fqn) if table is None else table.stated_size(fqn)
        if was is not None and isinstance(value, TensorStorageMetadata) and value.size != was:
            resized.add(fqn)
    return frozenset(resized)


def index_of(metadata: Metadata) -> Index:
    """The columns of any metadata; empty when it has no keys."""
    keys = metadata.state_dict_metadata
    index = keys.index() if isinstance(keys, KeyTable) else None
    return Index.of(keys) if index is None else index


_FIELDS_OF_METADATA = frozenset(field.name for field in fields(Metadata))


def further_fields(metadata: Metadata) -> dict[str, Any]:
    """The attributes that a planner or a framework has set, which are not torch's own."""
    return {name: v for name, v in vars(metadata).items() if name not in _FIELDS_OF_METADATA}


def copy_metadata(metadata: Metadata, **changes: Any) -> Metadata:
    """A shallow copy with some fields changed; further attributes are kept."""
    copied = copy.copy(metadata)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


def _is_unchanged(index: Index, fqn: str, value: STORAGE_TYPES) -> bool:
    row = index.row_of[fqn]
    if not isinstance(value, TensorStorageMetadata):
        return isinstance(value, BytesStorageMetadata) and bool(index.ndim[row] < 0)
    return (
        isinstance(value.chunks, ChunkList)
        and value.chunks.is_untouched(index, row)
        and value.size == size_of(index.size[row], int(index.ndim[row]))
        and value.properties == index.properties[index.property_of[row]]
    )
