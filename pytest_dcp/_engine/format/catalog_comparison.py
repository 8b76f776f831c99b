"""Which keys of two catalogs have the same bytes, as far as their checksums show. Pure (no I/O).

Two chunks of the same box and dtype with the same CRC-32 of every block have, but for one chance
in 2**32 for each block, the same elements. Keys that were cut in other ways, or that have no
checksums, are left open.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.plan.boxes import Ints, row_bounds, spans, volumes, widen_table

Rows = Ints | slice
ALL_ROWS = slice(None)
"""Where both have the same keys in the same order: gathering rows takes most of the time."""


def find_equal_keys(one: Catalog, other: Catalog) -> list[str]:
    """The names in both whose kind, shape, dtype, boxes and checksums are the same.

    An empty tensor needs no checksum.
    """
    a, b = one.index, other.index
    first, second = _pair_keys(one, other)
    rows: Rows = ALL_ROWS
    other_rows: Rows = ALL_ROWS
    bounds = a.first
    if not (len(first) == len(a) == len(b) and np.array_equal(first, second)):
        counts = np.diff(a.first)[first]
        bounds = row_bounds(counts)
        rows = np.repeat(a.first[first], counts) + spans(counts)
        other_rows = np.repeat(b.first[second], counts) + spans(counts)
    are_equal = _compare_rows(one, rows, other, other_rows)
    if are_equal.all():
        chosen = first
    else:
        unequal = np.concatenate([[0], np.cumsum(~are_equal)])
        chosen = first[unequal[bounds[1:]] == unequal[bounds[:-1]]]
    return [a.fqns[key] for key in chosen.tolist()]


def _pair_keys(one: Catalog, other: Catalog) -> tuple[Ints, Ints]:
    """The keys of both that have the same description, as rows of each index."""
    a, b = one.index, other.index
    if a.fqns == b.fqns:
        first = second = np.arange(len(a))
    else:
        pairs = [(row, b.row_of[fqn]) for fqn, row in a.row_of.items() if fqn in b.row_of]
        first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    width = max(a.size.shape[1], b.size.shape[1])
    dtypes = {dtype: n for n, dtype in enumerate({p.dtype for p in (*a.properties, *b.properties)})}
    kinds = [
        np.array([*(dtypes[p.dtype] for p in index.properties), -1])[index.property_of]
        for index in (a, b)
    ]
    alike = (
        (a.ndim[first] == b.ndim[second])
        & (kinds[0][first] == kinds[1][second])
        & (np.diff(a.first)[first] == np.diff(b.first)[second])
        & (widen_table(a.size[first], width, 1) == widen_table(b.size[second], width, 1)).all(
            axis=1
        )
    )
    return first[alike], second[alike]


def _compare_rows(one: Catalog, rows: Rows, other: Catalog, other_rows: Rows) -> NDArray[np.bool_]:
    """Whether each pair of chunks has the same box, and the same checksums."""
    a, b = one.index, other.index
    are_equal = _equal_rows(a.offset[rows], b.offset[other_rows], 0)
    are_equal &= _equal_rows(a.shape[rows], b.shape[other_rows], 1)
    p, q = one.places, other.places
    counts, other_counts = np.diff(p.first_sum)[rows], np.diff(q.first_sum)[other_rows]
    are_equal &= (counts == other_counts) & (p.block_bytes == q.block_bytes)
    bare = counts == 0
    if bare.any():
        are_equal &= ~bare | ((a.ndim[a.key_of[rows]] >= 0) & (volumes(a.shape[rows]) == 0))
    if isinstance(rows, slice) and are_equal.all():
        unequal = p.sums != q.sums
        if not unequal.any():
            return are_equal
        bounds = p.first_sum
    else:
        counts = np.where(are_equal, counts, 0)
        bounds = row_bounds(counts)
        at = np.repeat(p.first_sum[:-1][rows], counts) + spans(counts)
        other_at = np.repeat(q.first_sum[:-1][other_rows], counts) + spans(counts)
        unequal = p.sums[at] != q.sums[other_at]
    before = np.concatenate([[0], np.cumsum(unequal)])
    are_equal &= before[bounds[1:]] == before[bounds[:-1]]
    return are_equal


def _equal_rows(one: Ints, other: Ints, fill: int) -> NDArray[np.bool_]:
    width = max(one.shape[1], other.shape[1])
    unequal = widen_table(one, width, fill) != widen_table(other, width, fill)
    # Looking row by row takes ten times as long as comparing.
    is_unequal = unequal.any(axis=1) if unequal.any() else np.zeros(len(unequal), dtype=np.bool_)
    return ~is_unequal
