"""Read items -> copies between a file and memory, as columns. Pure (no I/O).

A stored chunk is row-major, so a box of it is a number of equal runs. Where runs follow each other
in the file and in the target without gaps, on the CPU and in one dtype, the box is one copy from
the file into the target's memory. Any other box is *strided*: it is read by runs or by spans.

Two ranks have saved rows of a 4x2 tensor `w`, and one of them `b`; this rank wants both whole:

>>> from torch.distributed.checkpoint.metadata import (
...     ChunkStorageMetadata, TensorProperties, TensorStorageMetadata)
>>> from pytest_dcp._engine.plan.describe import wanted_boxes
>>> from pytest_dcp._engine.plan.load import read_items
>>> def stored(size, *boxes):
...     chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
...     return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
>>> index = Index.of({
...     "w": stored([4, 2], ([0, 0], [2, 2]), ([2, 0], [2, 2])), "b": stored([2], ([0], [2]))})
>>> def plan(state):
...     items = read_items(wanted_boxes(state), index)
...     targets = Targets(np.arange(len(items)), [state[fqn] for fqn in items.fqns])
...     return copies(items, targets, index, odd_strides={})

Whole rows are one run each: `w` takes two copies of 16 bytes, the second 16 bytes further on:

>>> w, b = torch.zeros(4, 2), torch.zeros(2)
>>> found = plan({"w": w, "b": b})
>>> found.flat.tolist(), found.nbytes.tolist()
([True, True, True], [16, 16, 8])
>>> (found.address[:2] - w.data_ptr()).tolist()
[0, 16]

If `w` is transposed, no two elements are neighbours in both places: each is a separate run.

>>> found = plan({"w": torch.zeros(2, 4).T, "b": b})
>>> found.flat.tolist()
[False, False, True]
>>> runs(found.shape[0], found.from_stride[0], found.to_stride[0], itemsize=4)
(0, 4)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pytest_dcp._engine.plan.boxes import (
    Ints,
    out_of_bounds,
    pad_rows,
    strides_of,
    volumes,
    widen_table,
)
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.shards import PLAIN, require_memory
from pytest_dcp.errors import PlanError


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """The memory that rows of the read items fill."""

    rows: Ints
    """Of the read items."""
    tensors: Sequence[torch.Tensor]
    """For each of these rows, the row's whole wanted box."""


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """n boxes to copy, one row each."""

    row: Ints
    """Of the read items."""
    entry: Ints
    """Of the catalog: which stored chunk."""
    shape: Ints
    """(n, k) of the box."""
    from_stride: Ints
    """(n, k) bytes between neighbours in the file."""
    from_start: Ints
    """Bytes from the start of the chunk's data to the box's first element."""
    to_stride: Ints
    """(n, k) bytes between neighbours in the target."""
    address: Ints
    """Of the box's first element in the target's memory; 0 where it is not in CPU memory."""
    nbytes: Ints
    """Of the box, as stored."""
    flat: NDArray[np.bool_]
    """Whether the box is one run in the file and in memory, of one dtype."""
    target: Sequence[torch.Tensor]
    """The tensor that each box is a part of."""

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """The targets' own memory, as columns."""

    shapes: Sequence[Sequence[int]]
    strides: Sequence[Sequence[int]]
    """In elements."""
    dtypes: Sequence[torch.dtype]
    addresses: Ints
    """0 where it is not CPU memory that holds the values directly."""
    first: Ints
    """Elements before the tensor in its storage."""
    storage_bytes: Ints
    plain: NDArray[np.bool_]
    """Whether it is CPU memory that holds the values directly."""


def copies(
    items: ReadItems, targets: Targets, index: Index, odd_strides: Mapping[int, Sequence[int]]
) -> Copies:
    """The copies that fill these targets.

    odd_strides: bytes between neighbours of the chunks that are not stored row-major.
    """
    rows, width = targets.rows, items.shape.shape[1]
    memory = _memory_of(items, targets)
    entry, shape = items.entry[rows], items.shape[rows]
    dtypes = [p.dtype for p in index.properties]
    itemsize = index.itemsize[index.key_of[entry]]
    stored_shape = widen_table(index.shape[entry][:, :width], width, 1)
    room, to_stride = pad_rows(memory.shapes, width, 1), pad_rows(memory.strides, width, 0)
    _check_memory(items, targets, memory, room, to_stride)
    _check_inside(items, rows, stored_shape, room)
    from_stride = strides_of(stored_shape) * itemsize[:, None]
    for n, odd in _rows_with_odd_strides(entry, odd_strides):
        from_stride[n, : len(odd)] = odd
    _check_apart(items, rows, shape, to_stride)
    to_stride = to_stride * itemsize[:, None]
    stored = [dtypes[n] for n in index.property_of[index.key_of[entry]].tolist()]
    same = np.array([a is b for a, b in zip(stored, memory.dtypes, strict=True)], dtype=bool)
    # One run on both sides: it can be read straight into the target's memory.
    flat = memory.plain & same & _row_major(shape, from_stride, itemsize)
    flat &= _row_major(shape, to_stride, itemsize)
    moved = memory.addresses + (items.to_offset[rows] * to_stride).sum(axis=1, dtype=np.int64)
    return Copies(
        row=rows,
        entry=entry,
        shape=shape,
        from_stride=from_stride,
        from_start=(items.from_offset[rows] * from_stride).sum(axis=1, dtype=np.int64),
        to_stride=to_stride,
        address=np.where(memory.plain & same, moved, 0),
        nbytes=volumes(shape) * itemsize,
        flat=flat,
        target=targets.tensors,
    )


def _memory_of(items: ReadItems, targets: Targets) -> _Memory:
    """The memory of all targets, in one pass: there are thousands of tensors, and a second pass
    would miss the CPU cache.
    """
    # The table has all targets before any address is taken: getting one may move another's memory.
    looked_up = [
        (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.data_ptr(),
            tensor.storage_offset(),
            tensor.untyped_storage().nbytes(),
        )
        if type(tensor) in PLAIN and tensor.is_cpu and not tensor.is_conj() and not tensor.is_neg()
        else _of_unusual(items.fqns[row], tensor)
        for row, tensor in zip(targets.rows.tolist(), targets.tensors, strict=True)
    ]
    shapes, strides, dtypes, *numbers = zip(*looked_up, strict=True) if looked_up else ((),) * 6
    addresses, first, storage_bytes = (np.array(column, dtype=np.int64) for column in numbers)
    return _Memory(
        shapes, strides, dtypes, addresses, first, storage_bytes, plain=storage_bytes >= 0
    )


def _of_unusual(fqn: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """Like a row of the table, for any tensor: checked here; -1 bytes if it is not plain."""
    require_memory(fqn, tensor)
    shape, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
    if not tensor.is_cpu or tensor.is_conj() or tensor.is_neg():
        return shape, strides, dtype, 0, 0, -1
    storage_bytes = tensor.untyped_storage().nbytes()
    return shape, strides, dtype, tensor.data_ptr(), tensor.storage_offset(), storage_bytes


def _check_memory(
    items: ReadItems, targets: Targets, memory: _Memory, room: Ints, to_stride: Ints
) -> None:
    """Raise PlanError, as `require_memory` does, for a tensor whose storage is too small.

    room, to_stride: shapes and strides of the tensors, padded.
    """
    itemsize = np.fromiter((d.itemsize for d in memory.dtypes), np.int64, len(memory.dtypes))
    last = memory.first + 1 + ((room - 1) * to_stride).sum(axis=1, dtype=np.int64)
    bad = (last * itemsize > memory.storage_bytes) | (memory.addresses == 0)
    for n in np.flatnonzero(bad & memory.plain).tolist():  # An empty tensor may be among them.
        require_memory(items.fqns[targets.rows[n]], targets.tensors[n])


def _rows_with_odd_strides(
    entry: Ints, odd_strides: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, Sequence[int]]]:
    if odd_strides:
        for n, row in enumerate(entry.tolist()):
            if row in odd_strides:
                yield n, odd_strides[row]


def _check_inside(items: ReadItems, rows: Ints, stored: Ints, room: Ints) -> None:
    """Raise PlanError unless every box lies in its stored chunk and in its target.

    The plan may be any planner's, and the copies write to raw memory without further checks.
    """
    shape = items.shape[rows]
    bad = out_of_bounds(items.from_offset[rows], shape, stored)
    bad |= out_of_bounds(items.to_offset[rows], shape, room)
    for n in np.flatnonzero(bad)[:1].tolist():
        raise PlanError(
            f"the plan for {items.fqns[rows[n]]!r} copies shape {shape[n].tolist()} from offset "
            f"{items.from_offset[rows[n]].tolist()} of a stored chunk of {stored[n].tolist()} to "
            f"offset {items.to_offset[rows[n]].tolist()} of a target of {room[n].tolist()}"
        )


def _check_apart(items: ReadItems, rows: Ints, shape: Ints, to_stride: Ints) -> None:
    """Raise PlanError for an expanded target, whose elements share their memory."""
    shared = ((to_stride == 0) & (shape > 1)).any(axis=1)
    for n in np.flatnonzero(shared)[:1].tolist():
        raise PlanError(
            f"{items.fqns[rows[n]]!r} is expanded: several of its elements are one place in memory"
        )


def _row_major(shape: Ints, stride: Ints, itemsize: Ints) -> NDArray[np.bool_]:
    """Whether boxes of these strides (bytes) are one run. A dimension of one has no say."""
    expected = strides_of(shape) * itemsize[:, None]
    result: NDArray[np.bool_] = np.all((shape == 1) | (stride == expected), axis=1)
    return result


def runs(shape: Ints, from_stride: Ints, to_stride: Ints, itemsize: int) -> tuple[int, int]:
    """How many inner dimensions of one box form a run in both places, and the run's bytes."""
    nbytes = itemsize
    inner = 0
    for dim in range(len(shape) - 1, -1, -1):
        # A dimension of length one has no neighbours, so its stride does not matter.
        alone = shape[dim] == 1
        if not alone and (from_stride[dim] != nbytes or to_stride[dim] != nbytes):
            break
        nbytes *= int(shape[dim])
        inner += 1
    return inner, nbytes


def starts(shape: Ints, stride: Ints) -> Ints:
    """Byte offsets of every element of a box of this shape, in row-major order."""
    offsets = np.zeros(1, dtype=np.int64)
    for length, step in zip(shape.tolist(), stride.tolist(), strict=True):
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64) * step).ravel()
    return offsets


def span_of(shape: Ints, stride: Ints, itemsize: int) -> int:
    """Bytes from the first byte of a strided box to its last, inclusive."""
    if not shape.all():
        return 0
    return int(((shape - 1) * stride).sum()) + itemsize


def slabs(shape: Ints, stride: Ints, itemsize: int, limit: int) -> list[tuple[Ints, Ints]]:
    """A box cut into boxes that each span at most `limit` bytes: (offset, shape) of each.

    Cut along the outermost dimension that is longer than one, again and again; a single element
    is never cut.
    """
    if span_of(shape, stride, itemsize) <= limit:
        return [(np.zeros_like(shape), shape)]
    todo = [(np.zeros_like(shape), shape)]
    small_boxes: list[tuple[Ints, Ints]] = []
    while todo:
        offset, part = todo.pop()
        longer = np.flatnonzero(part > 1)
        if not len(longer) or span_of(part, stride, itemsize) <= limit:
            small_boxes.append((offset, part))
            continue
        dim = int(longer[0])
        inner = part.copy()
        inner[dim] = 1
        # The span that is left for further rows along this dimension; at least one row is taken,
        # and if that is too long, a later round cuts it further inside.
        room = limit - span_of(inner, stride, itemsize)
        step = max(1, room // max(int(stride[dim]), 1) + 1) if room > 0 else 1
        for start in range(0, int(part[dim]), step):
            piece, at = part.copy(), offset.copy()
            piece[dim] = min(step, int(part[dim]) - start)
            at[dim] += start
            todo.append((at, piece))
    return sorted(small_boxes, key=lambda slab: int((slab[0] * stride).sum()))
