"""Plans as columns that look like sequences of torch's items.

`SavePlan.items` and `LoadPlan.items` are `WriteItems` and `ReadItems`. A planner or storage written
for torch iterates over them and sees `WriteItem` and `ReadItem` objects, made on demand; the engine
reads the columns. They are pickled as a few arrays and one block of names.

A box is padded to the width of its table (see `boxes`); `ndim` is the number of real dimensions, or
-1 if an item has no offset at all (a byte value).

Why columns: a large job has thousands of items per rank, and each of torch's is a tree of Python
objects. numpy plans all ranks' rows at once, and a table pickles as a handful of arrays.

Assumes nothing about the planner: `of` takes any sequence of torch's items. Guarantees that a table
equals the list of items that it was made from, and never changes: a planner that edits an item
edits a copy, and `SavePlan.items` stays the same.

Rank 0 of two writes two rows of the 4x2 tensor `w` and a value `step`:

>>> from torch.distributed.checkpoint.planner import TensorWriteData
>>> box = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 2]))
>>> data = TensorWriteData(box, TensorProperties(torch.float32), torch.Size([4, 2]))
>>> w = WriteItem(MetadataIndex("w", [0, 0]), WriteItemType.SHARD, tensor_data=data)
>>> step = WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO)
>>> table = WriteItems.of([w, step])
>>> table.fqns, table.ndim.tolist()
(('w', 'step'), [2, -1])
>>> table.size.tolist(), table.offset.tolist(), table.shape.tolist()
([[4, 2], [1, 1]], [[0, 0], [0, 0]], [[2, 2], [1, 1]])
>>> table.size_bytes().tolist()  # a value's size is not known before it is written
[16, 1]

It is a sequence of torch's items, made on demand:

>>> table[0].tensor_data.chunk
ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([2, 2]))
>>> table == [w, step]
True

`take` remembers its source, so that a plan can be sent as row numbers (`verbs.save_messages`):

>>> kept = table.take(np.array([1]), hint=np.array([-1]))
>>> kept.fqns, kept.origin.rows.tolist(), kept.origin.table is table
(('step',), [1], True)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from pytest_dcp._engine.plan.boxes import Ints, pad_rows, volumes
from pytest_dcp._engine.plan.column_table import AT_HOME, ColumnTable
from pytest_dcp._engine.plan.packed_names import Fqns, pack_names, unpack_names

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

Item = TypeVar("Item", WriteItem, ReadItem)

WRITE_KINDS = tuple(WriteItemType)
BYTES, TENSOR, SHARD = (
    WRITE_KINDS.index(kind)
    for kind in (WriteItemType.BYTE_IO, WriteItemType.TENSOR, WriteItemType.SHARD)
)
READ_KINDS = tuple(LoadItemType)
READ_BYTES, READ_TENSOR = (
    READ_KINDS.index(kind) for kind in (LoadItemType.BYTE_IO, LoadItemType.TENSOR)
)
UNKNOWN = -1
"""No hint, property or number of bytes; as `ndim`: no offset."""


class ItemTable(ColumnTable, Sequence[Item]):
    """Rows that become items on demand, one row in each column. Immutable."""

    __slots__ = ()

    fqns: Fqns

    def __len__(self) -> int:
        return len(self.fqns)

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self.item(row) for row in range(*at.indices(len(self)))]
        return self.item(range(len(self))[at])

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))

    def __add__(self, other: Sequence[Item]) -> list[Item]:
        return list(self) + list(other)

    def __radd__(self, other: Sequence[Item]) -> list[Item]:
        return list(other) + list(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compares by content, as a list does

    def item(self, row: int) -> Item:
        """The row as torch's object."""
        raise NotImplementedError

    def columns_at(self, rows: Ints) -> dict[str, Any]:
        """Each column in these rows, by name."""
        return {name: getattr(self, name)[rows] for name in self.column_names()}


def size_of(row: Ints, ndim: int) -> torch.Size:
    """The real dimensions of a padded row."""
    return torch.Size(row[:ndim].tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The rows of the table that this one was taken from."""

    table: WriteItems
    rows: Ints


@dataclass(frozen=True, slots=True, eq=False)
class WriteItems(ItemTable[WriteItem]):
    """The items that one rank writes, one per row."""

    fqns: Fqns
    kind: NDArray[np.int8]
    """Positions in WRITE_KINDS."""
    properties: tuple[TensorProperties, ...]
    """The distinct ones."""
    property_of: NDArray[np.int32]
    """Positions in `properties`; -1 for bytes."""
    ndim: NDArray[np.int16]
    size: Ints
    """Of the full tensor."""
    offset: Ints
    shape: Ints
    """Of this rank's box in the tensor."""
    hint: Ints
    """`MetadataIndex.index`: the box's position in the metadata's list; -1: none."""
    nbytes: Ints
    """Of a byte value, if the planner knows it; of the inner tensors of a wrapper; else -1."""
    origin: Origin | None = field(default=None, metadata=AT_HOME)
    """Where the rows were taken from; not pickled with the table."""

    def item(self, row: int) -> WriteItem:
        ndim = int(self.ndim[row])
        kind = WRITE_KINDS[self.kind[row]]
        if self.kind[row] == BYTES:
            nbytes = int(self.nbytes[row])
            bytes_data = None if nbytes < 0 else BytesIOWriteData(nbytes)
            return WriteItem(self.key(row), kind, bytes_io_data=bytes_data)
        chunk = ChunkStorageMetadata(
            size_of(self.offset[row], ndim), size_of(self.shape[row], ndim)
        )
        # A copy: a planner may change the properties of one item alone.
        properties = replace(self.properties[self.property_of[row]])
        data = TensorWriteData(chunk, properties, size_of(self.size[row], ndim))
        return WriteItem(self.key(row), kind, tensor_data=data)

    def key(self, row: int) -> MetadataIndex:
        """The key of the row's item."""
        hint = int(self.hint[row])
        ndim = int(self.ndim[row])
        offset = None if ndim < 0 else self.offset[row, :ndim].tolist()
        return MetadataIndex(self.fqns[row], offset, None if hint < 0 else hint)

    def take(self, rows: Ints, hint: Ints | None = None) -> WriteItems:
        """These rows in this order, with other hints where given."""
        fqns = self.fqns
        # The same tuple if nothing is left out: other code compares names by identity.
        everything = len(rows) == len(fqns) and bool((rows == np.arange(len(rows))).all())
        # Nor a copy of any column: the coordinator of a large job takes all rows of most ranks.
        columns = {} if everything else self.columns_at(rows)
        if hint is not None:
            columns["hint"] = hint
        chosen = fqns if everything else tuple(map(fqns.__getitem__, rows.tolist()))
        return replace(self, fqns=chosen, origin=Origin(self, rows), **columns)

    def size_bytes(self) -> Ints:
        """Bytes of data of each row's box; for a byte value the known size, at least 1.

        A wrapper's are those of its inner tensors, which may be fewer than its shape and dtype say.
        """
        # A value's property is -1, which selects the last width: the `where` below drops that
        # result.
        width = np.array([p.dtype.itemsize for p in self.properties] or [1], dtype=np.int64)
        tensors = volumes(self.shape) * width[self.property_of]
        tensor_bytes = np.where(self.nbytes < 0, tensors, self.nbytes)
        return np.where(self.kind == BYTES, np.maximum(self.nbytes, 1), tensor_bytes)

    @classmethod
    def of(cls, items: Sequence[WriteItem]) -> WriteItems:
        """The table of any planner's items."""
        if isinstance(items, cls):
            return items
        property_numbers: dict[Any, int] = {}
        data = [item.tensor_data for item in items]
        rank = max((len(d.size) for d in data if d is not None), default=0)
        offsets = [
            item.index.offset if d is None else d.chunk.offsets
            for item, d in zip(items, data, strict=True)
        ]
        return cls(
            fqns=tuple(item.index.fqn for item in items),
            kind=np.array([WRITE_KINDS.index(item.type) for item in items], dtype=np.int8),
            property_of=np.array(
                [
                    UNKNOWN if d is None else number_properties(property_numbers, d.properties)
                    for d in data
                ],
                dtype=np.int32,
            ),
            properties=tuple(TensorProperties(*key) for key in property_numbers),
            ndim=np.array([UNKNOWN if o is None else len(o) for o in offsets], dtype=np.int16),
            size=pad_rows([() if d is None else d.size for d in data], rank, 1),
            offset=pad_rows([() if o is None else o for o in offsets], rank, 0),
            shape=pad_rows([() if d is None else d.chunk.sizes for d in data], rank, 1),
            hint=np.array([hint_of(item.index) for item in items], dtype=np.int64),
            nbytes=np.array(
                [UNKNOWN if i.bytes_io_data is None else i.bytes_io_data.nbytes for i in items],
                dtype=np.int64,
            ),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt_writes, (pack_names(self.fqns), self.sent_fields())


@dataclass(frozen=True, slots=True, eq=False)
class ReadItems(ItemTable[ReadItem]):
    """The items that one rank reads, one row per copy from a stored box to a part of a
    wanted box.
    """

    fqns: Fqns
    """Of the wanted boxes."""
    stored_fqns: Fqns
    """The checkpoint's names: the same tuple unless keys are renamed on the way."""
    kind: NDArray[np.int8]
    """Positions in READ_KINDS."""
    ndim: NDArray[np.int16]
    wanted_offset: Ints
    """Offset of the wanted box in the full tensor (`dest_index.offset`)."""
    wanted_hint: Ints
    """The wanted box's position among this rank's boxes of the tensor; -1: none."""
    to_offset: Ints
    """Where the copy lands, relative to the wanted box."""
    stored: Ints
    """Offset of the stored box in the full tensor (`storage_index.offset`)."""
    stored_hint: Ints
    from_offset: Ints
    """Where the copy starts, relative to the stored box."""
    shape: Ints
    """Of the copy."""
    entry: Ints
    """Row of the stored box in the index that the plan was made from; -1: not known."""
    source: object = field(default=None, metadata=AT_HOME)
    """That index; None if it is not available. Not included when the table is pickled."""

    def item(self, row: int) -> ReadItem:
        fqn, stored_fqn = self.fqns[row], self.stored_fqns[row]
        ndim = int(self.ndim[row])
        if self.kind[row] == READ_BYTES:
            zero = torch.Size((0,))
            key, stored = MetadataIndex(fqn), MetadataIndex(stored_fqn)
            return ReadItem(LoadItemType.BYTE_IO, key, zero, stored, zero, zero)
        return ReadItem(
            LoadItemType.TENSOR,
            dest_index=index_at(fqn, self.wanted_offset[row], ndim, self.wanted_hint[row]),
            dest_offsets=size_of(self.to_offset[row], ndim),
            storage_index=index_at(stored_fqn, self.stored[row], ndim, self.stored_hint[row]),
            storage_offsets=size_of(self.from_offset[row], ndim),
            lengths=size_of(self.shape[row], ndim),
        )

    @classmethod
    def of(cls, items: Sequence[ReadItem]) -> ReadItems:
        """The table of any planner's items."""
        if isinstance(items, cls):
            return items
        rank = max((len(i.lengths) for i in items if i.type == LoadItemType.TENSOR), default=0)
        tensors = [item.type == LoadItemType.TENSOR for item in items]

        def box(pick: str, fill: int) -> Ints:
            rows = [getattr(i, pick) if t else () for i, t in zip(items, tensors, strict=True)]
            return pad_rows(rows, rank, fill)

        def corner(index: str) -> Ints:
            rows = [
                getattr(i, index).offset or () if t else ()
                for i, t in zip(items, tensors, strict=True)
            ]
            return pad_rows(rows, rank, 0)

        return cls(
            fqns=tuple(item.dest_index.fqn for item in items),
            stored_fqns=tuple(item.storage_index.fqn for item in items),
            kind=np.array([READ_KINDS.index(item.type) for item in items], dtype=np.int8),
            ndim=np.array(
                [len(i.lengths) if t else UNKNOWN for i, t in zip(items, tensors, strict=True)],
                dtype=np.int16,
            ),
            wanted_offset=corner("dest_index"),
            wanted_hint=np.array([hint_of(i.dest_index) for i in items], dtype=np.int64),
            to_offset=box("dest_offsets", 0),
            stored=corner("storage_index"),
            stored_hint=np.array([hint_of(i.storage_index) for i in items], dtype=np.int64),
            from_offset=box("storage_offsets", 0),
            shape=box("lengths", 1),
            entry=np.full(len(items), UNKNOWN, dtype=np.int64),
        )

    def take(self, rows: Ints) -> Self:
        """These rows in this order."""
        fqns = tuple(self.fqns[row] for row in rows.tolist())
        renamed = self.stored_fqns is not self.fqns
        stored = tuple(self.stored_fqns[row] for row in rows.tolist()) if renamed else fqns
        return replace(self, fqns=fqns, stored_fqns=stored, **self.columns_at(rows))

    def __reduce__(self) -> tuple[Any, ...]:
        names = (pack_names(self.fqns), pack_names(self.stored_fqns))
        return rebuilt_reads, (*names, self.sent_fields())


def index_at(fqn: str, offset: Ints, ndim: int, hint: int) -> MetadataIndex:
    """The key of a box from its padded offset."""
    return MetadataIndex(fqn, offset[:ndim].tolist(), None if hint < 0 else int(hint))


def hint_of(index: MetadataIndex) -> int:
    """The key's hint, -1 for none."""
    return UNKNOWN if index.index is None else index.index


def number_properties(property_numbers: dict[Any, int], properties: TensorProperties) -> int:
    """The position of these properties among the known ones; new ones are added."""
    p = properties
    key = (p.dtype, p.layout, p.requires_grad, p.memory_format, p.pin_memory)
    return property_numbers.setdefault(key, len(property_numbers))


def rebuilt_writes(names: bytes, columns: dict[str, Any]) -> WriteItems:
    """The table that was pickled."""
    return WriteItems(fqns=unpack_names(names), **columns)


def rebuilt_reads(names: bytes, stored: bytes, columns: dict[str, Any]) -> ReadItems:
    """The table that was pickled."""
    return ReadItems(fqns=unpack_names(names), stored_fqns=unpack_names(stored), **columns)


def has_values(items: Sequence[ReadItem]) -> bool:
    """Whether a Python value is among the items."""
    if isinstance(items, ReadItems):
        return bool((items.kind == READ_BYTES).any())
    return any(item.type == LoadItemType.BYTE_IO for item in items)
