"""Boxes of tensors, many at a time. Pure (no I/O).

A box is a half-open block of a tensor: an offset and a shape, in elements. n boxes are two int64
arrays of shape (n, k), where k is the largest rank (number of dimensions) among them: a box of a
tensor with fewer dimensions has offset 0 and shape 1 in the missing ones, so that a 0-d box holds
one element and no formula needs a special case. An empty box has a 0 in its shape.

Two ranks hold rows 0 and 1, and 2 and 3, of a 4x2 tensor `w`, and each all of a tensor `b` of two
elements. As one table, `b` padded to two dimensions:

>>> offset = pad_rows([(0, 0), (2, 0), (0,), (0,)], 2, 0)
>>> shape = pad_rows([(2, 2), (2, 2), (2,), (2,)], 2, 1)
>>> offset.tolist(), shape.tolist()
([[0, 0], [2, 0], [0, 0], [0, 0]], [[2, 2], [2, 2], [2, 1], [2, 1]])
>>> volumes(shape).tolist()
[4, 4, 2, 2]

Rows 1 and 2 of `w` are the last row of the first box and the first row of the second:

>>> want = np.array([[1, 0]] * 2), np.array([[2, 2]] * 2)
>>> low, overlap, shared = intersect(*want, offset[:2], shape[:2])
>>> low.tolist(), overlap.tolist(), shared.tolist()
([[1, 0], [2, 0]], [[1, 2], [1, 2]], [True, True])

The boxes of `w` are disjoint; the boxes of `b` share their elements:

>>> overlapping_pairs(offset[:2], shape[:2]), overlapping_pairs(offset[2:], shape[2:])
([], [(0, 1)])
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def pad_rows(rows: Sequence[Sequence[int]], rank: int, fill: int) -> Ints:
    """The rows as one (n, rank) array, each padded on the right with `fill`.

    >>> pad_rows([(4, 2), (3,), ()], 2, 1).tolist()
    [[4, 2], [3, 1], [1, 1]]
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    # Faster than an array of the rows, for which numpy would inspect each one's type.
    cells = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    if (lengths == rank).all():
        return cells.reshape(len(rows), rank)
    table = np.full((len(rows), rank), fill, dtype=np.int64)
    table[np.arange(rank) < lengths[:, None]] = cells
    return table


def widen_table(table: Ints, rank: int, fill: int) -> Ints:
    """The (n, k) table with `rank` >= k columns."""
    missing = rank - table.shape[1]
    if not missing:
        return table
    wide: Ints = np.pad(table, ((0, 0), (0, missing)), constant_values=fill)
    return wide


def volumes(shape: Ints) -> Ints:
    """Elements of each box."""
    product: Ints = shape.prod(axis=1, dtype=np.int64)
    return product


def strides_of(shape: Ints) -> Ints:
    """Strides, in elements, of row-major tensors of these shapes.

    >>> strides_of(np.array([[4, 3, 2]])).tolist()
    [[6, 2, 1]]
    """
    if not shape.shape[1]:
        return shape.copy()
    ahead = np.ones_like(shape)
    # An empty dimension counts as 1, as in torch: the strides of the others stay distinct.
    ahead[:, :-1] = np.maximum(shape[:, 1:], 1)
    strides: Ints = ahead[:, ::-1].cumprod(axis=1)[:, ::-1]
    return strides


def intersect(
    offset_a: Ints, shape_a: Ints, offset_b: Ints, shape_b: Ints
) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """The overlaps of the i-th box of `a` with the i-th of `b`: offset, shape, and whether any.

    If there is no overlap, offset and shape mean nothing. An empty box overlaps nothing.
    """
    low = np.maximum(offset_a, offset_b)
    high = np.minimum(offset_a + shape_a, offset_b + shape_b)
    return low, high - low, np.all(high > low, axis=1)


def row_bounds(counts: Ints) -> Ints:
    """(n + 1,) the first row of each group when n groups of these sizes follow each other, and the
    end of the last.

    >>> row_bounds(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    bounds = np.zeros(len(counts) + 1, dtype=np.int64)
    counts.cumsum(out=bounds[1:])
    return bounds


def spans(counts: Ints) -> Ints:
    """0..counts[0]-1, then 0..counts[1]-1, and so on: the position of each element in its group.

    >>> spans(np.array([3, 0, 2])).tolist()
    [0, 1, 2, 0, 1]
    """
    total = int(counts.sum())
    starts = np.repeat(counts.cumsum() - counts, counts)
    return np.arange(total, dtype=np.int64) - starts


def out_of_bounds(offset: Ints, shape: Ints, size: Ints) -> NDArray[np.bool_]:
    """Whether each box exceeds its tensor, whose size is in the same row, or has a negative
    side."""
    # Not offset + shape > size, which could wrap around for numbers of a foreign plan.
    bad: NDArray[np.bool_] = (offset < 0) | (shape < 0) | (offset > size - shape)
    row_is_bad: NDArray[np.bool_] = np.any(bad, axis=1)
    return row_is_bad


def overlapping_pairs(offset: Ints, shape: Ints, limit: int = 8) -> list[tuple[int, int]]:
    """Pairs of rows whose boxes share an element, at most `limit` of them, lower row first.

    Sweeps along the dimension with the most distinct offsets: sorts the boxes by their start and
    compares each with the ones that start before it ends. Takes n log n for boxes that are cut
    along that dimension alone, and n * n at worst, if all of them span it.

    >>> offset, shape = np.array([[0, 0], [0, 2], [1, 1]]), np.array([[2, 2], [2, 2], [2, 2]])
    >>> overlapping_pairs(offset, shape)
    [(0, 2), (1, 2)]
    """
    # An empty box overlaps nothing, yet would widen the sweep.
    rows = np.flatnonzero(volumes(shape) > 0)
    if len(rows) < 2:
        return []
    if not offset.shape[1]:  # scalars: all boxes are the one element
        return [(int(rows[0]), int(rows[1]))]
    offset, shape = offset[rows], shape[rows]
    # The more distinct starts, the fewer boxes lie side by side and must be compared.
    dim = int(np.argmax([len(np.unique(column)) for column in offset.T]))
    order = np.argsort(offset[:, dim], kind="stable")
    offset, shape, rows = offset[order], shape[order], rows[order]
    start = offset[:, dim]
    # For each box, how many later ones in this order start before it ends: only these can overlap
    # it.
    # "left": a box that starts exactly where another ends does not overlap it.
    ahead = np.searchsorted(start, start + shape[:, dim], side="left") - np.arange(len(rows)) - 1
    found: list[tuple[int, int]] = []
    for part in split_by_total(ahead):
        first = np.repeat(part, ahead[part])
        second = first + 1 + spans(ahead[part])
        _, _, shared = intersect(offset[first], shape[first], offset[second], shape[second])
        for a, b in zip(rows[first[shared]], rows[second[shared]], strict=True):
            found.append((int(min(a, b)), int(max(a, b))))
            if len(found) >= limit:
                return found
    return found


def split_by_total(counts: Ints, budget: int = 1 << 20) -> list[Ints]:
    """Row numbers in runs whose counts sum to about `budget`: bounds the memory of a pairing."""
    slab = (counts.cumsum() - counts) // budget
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(slab)) + 1)
