"""What a checkpoint holds, as columns that look like torch's metadata.

An `Index` is a table of keys and a table of chunks (the stored boxes; the chunks of a key are
adjacent rows). `KeyTable` stands in `Metadata.state_dict_metadata`: a mapping that makes torch's
objects for the keys that somebody looks at. A change made through it turns it into a plain dict,
and `index_of` then reads the objects again, so that no planner's edit is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp.checkpoint.plan.boxes import Ints, padded
from pytest_dcp.checkpoint.plan.columns import UNKNOWN, position, size_of
from pytest_dcp.checkpoint.plan.names import Fqns


@dataclass(frozen=True, eq=False)
class Index:
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
        known: dict[Any, int] = {}
        chunks = [[None] if t is None else list(t.chunks) for t in tensors]
        flat = [chunk for some in chunks for chunk in some]
        rank = max((len(t.size) for t in tensors if t is not None), default=0)
        counts = np.array([len(some) for some in chunks], dtype=np.int64)
        return cls(
            fqns=tuple(keys),
            property_of=np.array(
                [UNKNOWN if t is None else position(known, t.properties) for t in tensors],
                dtype=np.int32,
            ),
            properties=tuple(TensorProperties(*key) for key in known),
            ndim=np.array([UNKNOWN if t is None else len(t.size) for t in tensors], dtype=np.int16),
            size=padded([() if t is None else t.size for t in tensors], rank, 1),
            first=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
            offset=padded([() if c is None else c.offsets for c in flat], rank, 0),
            shape=padded([() if c is None else c.sizes for c in flat], rank, 1),
        )


class ChunkList(MutableSequence[ChunkStorageMetadata]):
    """The chunks of one key: rows of an index until somebody changes them, then a list."""

    __slots__ = ("_index", "_list", "_made", "_start", "_stop")

    def __init__(self, index: Index, row: int) -> None:
        self._index = index
        self._start, self._stop = int(index.first[row]), int(index.first[row + 1])
        self._list: list[ChunkStorageMetadata] | None = None
        self._made: dict[int, ChunkStorageMetadata] = {}

    def untouched(self, index: Index, row: int) -> bool:
        """Whether these are still the chunks of that key of that index."""
        return (
            self._list is None
            and self._index is index
            and self._start == index.first[row]
            and all(chunk == index.chunk(at) for at, chunk in self._made.items())
        )

    def __len__(self) -> int:
        return self._stop - self._start if self._list is None else len(self._list)

    @overload
    def __getitem__(self, at: int) -> ChunkStorageMetadata: ...
    @overload
    def __getitem__(self, at: slice) -> list[ChunkStorageMetadata]: ...
    def __getitem__(self, at: int | slice) -> Any:
        if self._list is not None:
            return self._list[at]
        rows = range(self._start, self._stop)[at]
        if isinstance(rows, range):
            return [self._chunk(row) for row in rows]
        return self._chunk(rows)

    def __setitem__(self, at: Any, value: Any) -> None:
        self._own()[at] = value

    def __delitem__(self, at: int | slice) -> None:
        del self._own()[at]

    def insert(self, at: int, value: ChunkStorageMetadata) -> None:
        self._own().insert(at, value)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Iterable) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # a list, to whoever looks

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def _chunk(self, row: int) -> ChunkStorageMetadata:
        """The row's object, always the same one: it can be changed."""
        return self._made.get(row) or self._made.setdefault(row, self._index.chunk(row))

    def _own(self) -> list[ChunkStorageMetadata]:
        if self._list is None:
            self._list = list(self)
        return self._list


class KeyTable(MutableMapping[str, STORAGE_TYPES]):
    """`Metadata.state_dict_metadata` over an index: values are made when they are asked for."""

    def __init__(self, index: Index) -> None:
        self._index: Index | None = index
        self._made: dict[str, STORAGE_TYPES] = {}

    def index(self) -> Index | None:
        """The index, or None when somebody changed a key or a value."""
        index = self._index
        if index is None or not all(_as_made(index, *made) for made in self._made.items()):
            return None
        return index

    def __getitem__(self, fqn: str) -> STORAGE_TYPES:
        made = self._made.get(fqn)
        if made is None:
            if self._index is None:
                raise KeyError(fqn)
            made = self._made[fqn] = self._index.value(self._index.row_of[fqn])
        return made

    def __contains__(self, fqn: object) -> bool:
        return fqn in (self._made if self._index is None else self._index.row_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._made if self._index is None else self._index.fqns)

    def __len__(self) -> int:
        return len(self._made if self._index is None else self._index)

    def __setitem__(self, fqn: str, value: STORAGE_TYPES) -> None:
        self._own()[fqn] = value

    def __delitem__(self, fqn: str) -> None:
        del self._own()[fqn]

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def _own(self) -> dict[str, STORAGE_TYPES]:
        if self._index is not None:
            self._made = dict(self)
            self._index = None
        return self._made


def index_of(metadata: Metadata) -> Index:
    """The metadata's columns, whoever made it; empty when it has no keys."""
    keys = metadata.state_dict_metadata
    index = keys.index() if isinstance(keys, KeyTable) else None
    return Index.of(keys) if index is None else index


def _as_made(index: Index, fqn: str, value: STORAGE_TYPES) -> bool:
    if isinstance(value, BytesStorageMetadata):
        return True
    row = index.row_of[fqn]
    return (
        isinstance(value.chunks, ChunkList)
        and value.chunks.untouched(index, row)
        and value.size == size_of(index.size[row], int(index.ndim[row]))
        and value.properties == index.properties[index.property_of[row]]
    )
