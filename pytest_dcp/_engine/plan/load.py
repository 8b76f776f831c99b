"""Wanted boxes x stored boxes -> what to read. Pure (no I/O).

A rank wants the boxes of full tensors that its state dict holds. The checkpoint stores boxes of the
same tensors, cut by other ranks for another mesh. Every overlap of a wanted box with a stored one
is one copy, and one row of the plan: a shape, where it starts in the stored box, and where it
starts in the wanted one. Resharding needs nothing more: in a load on the same mesh each wanted box
overlaps exactly one stored box of its own size.

The steps:

1. Each wanted name is looked up in the index, under the name that the checkpoint has for it.
2. `_check_apart`: the stored boxes of the wanted tensors must not overlap. Without this rule an
   element that is stored twice could hide a missing one in the count of step 4.
3. Each wanted box is paired with all stored boxes of its name, and the pairs are intersected, about
   `PAIRS_AT_ONCE` at a time. For w wanted boxes of a tensor in s chunks these are w * s pairs.
4. `_check_filled`: since stored boxes are disjoint, a wanted box is filled exactly if its overlaps
   have as many elements as the box. One pass of sums finds every gap.

Assumes that the boxes of the index lie inside their tensors (`catalog_checks` checks this when
reading it), and that the index has every wanted name with the same size (`match_keys` checks this
first). Guarantees that the rows write each element of each wanted box exactly once (except for the
names in `partial`, whose gaps are not written), that they read nothing else, and that they are
ordered by wanted box, then by stored box. Each rank plans alone, from its own state dict and the
checkpoint's index: planning a load needs no peer.

Two ranks have saved `w`, rows 0 to 2 and rows 3 and 4, and one of them `b`. This rank is the second
of three that load: of `w` it wants rows 2 and 3, which lie in both stored boxes:

>>> import torch
>>> from torch.distributed.checkpoint.metadata import (
...     ChunkStorageMetadata, TensorProperties, TensorStorageMetadata)
>>> def stored(size, *boxes):
...     chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
...     return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
>>> index = Index.of({
...     "w": stored([5, 2], ([0, 0], [3, 2]), ([3, 0], [2, 2])),
...     "b": stored([2], ([0], [2])),
... })
>>> wanted = Wanted(
...     fqns=("w", "b"), ndim=np.array([2, 1]), offset=np.array([[2, 0], [0, 0]]),
...     shape=np.array([[2, 2], [2, 1]]), nth=np.array([0, 0]))
>>> plan = read_items(wanted, index)

For `w` it copies the last row of the first chunk and the first row of the second; `b` is one copy:

>>> list(zip(plan.fqns, plan.entry.tolist()))
[('w', 0), ('w', 1), ('b', 2)]
>>> plan.from_offset.tolist(), plan.to_offset.tolist(), plan.shape.tolist()
([[2, 0], [0, 0], [0, 0]], [[0, 0], [1, 0], [0, 0]], [[1, 2], [1, 2], [2, 1]])
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import islice

import numpy as np

from pytest_dcp._engine.plan.box_coverage import overlaps
from pytest_dcp._engine.plan.boxes import Ints, intersect, spans, volumes, widen_table
from pytest_dcp._engine.plan.columns import READ_BYTES, READ_TENSOR, UNKNOWN, ReadItems
from pytest_dcp._engine.plan.describe import Wanted
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError

PAIRS_AT_ONCE = 1 << 20
"""Pairs of a wanted and a stored box intersected at a time: bounds the memory."""


def read_items(
    boxes: Wanted,
    index: Index,
    stored_as: Mapping[str, str] | None = None,
    *,
    partial: Container[str] = (),
) -> ReadItems:
    """One row for each overlap of a wanted box with a stored one.

    Every wanted name must be in the index, under the name that `stored_as` gives for it. Raises
    CheckpointCorruptError if the stored boxes lack a wanted element, or hold one twice. For the
    names in `partial` they may lack elements.
    """
    # Values travel as boxes of no dimensions: padded to offset 0 and shape 1 they overlap
    # themselves once, so that they need no branch until the kinds are set below.
    width = max(boxes.offset.shape[1], index.offset.shape[1])
    names = boxes.fqns
    stored_fqns = names if stored_as is None else tuple(stored_as.get(n, n) for n in names)
    key = np.array([index.row_of[fqn] for fqn in stored_fqns], dtype=np.int64)
    want_offset = widen_table(boxes.offset, width, 0)
    have_offset = widen_table(index.offset, width, 0)
    # Before `_check_filled`, whose sums prove something only for disjoint chunks.
    _check_apart(index, key)
    wanted_boxes = want_offset, widen_table(boxes.shape, width, 1)
    stored_boxes = have_offset, widen_table(index.shape, width, 1)
    want, have, low, shape = _find_overlaps(wanted_boxes, stored_boxes, index.first, key)
    # Only tensors can have gaps: a value is stored whole.
    tensors = boxes.ndim[want] >= 0
    _check_filled(boxes, want[tensors], shape[tensors], partial)
    fqns = tuple(map(names.__getitem__, want.tolist()))
    renamed = stored_fqns is not names
    return ReadItems(
        fqns=fqns,
        stored_fqns=tuple(map(stored_fqns.__getitem__, want.tolist())) if renamed else fqns,
        kind=np.where(tensors, READ_TENSOR, READ_BYTES).astype(np.int8),
        ndim=boxes.ndim[want],
        wanted_offset=want_offset[want],
        wanted_hint=np.where(tensors, boxes.nth[want], UNKNOWN),
        to_offset=low - want_offset[want],
        stored=have_offset[have],
        stored_hint=np.where(tensors, have - index.first[key[want]], UNKNOWN),
        from_offset=low - have_offset[have],
        shape=shape,
        entry=have,
        source=index,
    )


def _find_overlaps(
    wanted_boxes: tuple[Ints, Ints], stored: tuple[Ints, Ints], first: Ints, key: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """The rows of the wanted and the stored boxes that overlap; offset and shape of each overlap.

    wanted_boxes, stored: offsets and shapes. first: the first stored row of each name, and their
    end; key: the name of each wanted row.
    """
    (want_offset, want_shape), (have_offset, have_shape) = wanted_boxes, stored
    counts = np.diff(first)[key]
    parts = []
    for rows in _slabs(counts):
        # Each wanted row beside every stored row of its name.
        want = np.repeat(rows, counts[rows])
        have = first[key[want]] + spans(counts[rows])
        low, shape, shared = intersect(
            want_offset[want], want_shape[want], have_offset[have], have_shape[have]
        )
        parts.append((want[shared], have[shared], low[shared], shape[shared]))
    return _concatenate_copies(parts, want_offset.shape[1])


def _slabs(counts: Ints) -> list[Ints]:
    """Wanted rows in runs of about `PAIRS_AT_ONCE` pairs; a single row may exceed that."""
    # Cut between wanted rows only: the overlaps of one row stay together and in order.
    slab = (counts.cumsum() - counts) // PAIRS_AT_ONCE
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(slab)) + 1)


def _concatenate_copies(
    parts: Sequence[tuple[Ints, Ints, Ints, Ints]], width: int
) -> tuple[Ints, Ints, Ints, Ints]:
    none, nothing = np.zeros(0, dtype=np.int64), np.zeros((0, width), dtype=np.int64)
    # Gives dtypes and width where there is no part at all.
    empty = (none, none, nothing, nothing)
    want, have, low, shape = (
        np.concatenate(columns) for columns in zip(*parts, empty, strict=True)
    )
    return want, have, low, shape


class Everything(Container[str]):
    """Contains every name."""

    def __contains__(self, _: object) -> bool:
        return True


def _check_filled(boxes: Wanted, want: Ints, shape: Ints, partial: Container[str]) -> None:
    """Raise unless the overlaps fill each wanted box exactly."""
    filled = np.zeros(len(boxes), dtype=np.int64)
    np.add.at(filled, want, volumes(shape))
    expected = np.where(boxes.ndim >= 0, volumes(boxes.shape), 0)
    gaps = (row for row in np.flatnonzero(filled != expected) if boxes.fqns[row] not in partial)
    for row in islice(gaps, 1):
        box_shape = tuple(boxes.shape[row, : boxes.ndim[row]].tolist())
        offset = tuple(boxes.offset[row, : boxes.ndim[row]].tolist())
        raise CheckpointCorruptError(
            f"{filled[row]} of {expected[row]} elements of the part of shape {box_shape} at offset "
            f"{offset} are stored: the stored chunks leave a gap",
            entry=boxes.fqns[row],
        )


def _check_apart(index: Index, key: Ints) -> None:
    """Raise if stored chunks of a wanted key overlap: a gap elsewhere would go unnoticed."""
    is_read = np.zeros(len(index), dtype=bool)
    is_read[key] = True
    for at, one, other in overlaps(index, only=is_read)[:1]:
        raise CheckpointCorruptError(
            f"its stored chunks overlap: {index.chunk(one)} and {index.chunk(other)}",
            entry=index.fqns[at],
        )
