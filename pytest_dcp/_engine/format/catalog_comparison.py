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


def find_equal_keys(one: Catalog, other: Catalog) -> list[str]:
    """The names in both whose kind, shape, dtype, boxes and checksums are the same.

    An empty tensor needs no checksum.
    """
    first, second = _pair_keys(one, other)
    counts = np.diff(one.index.first)[first]
    rows = np.repeat(one.index.first[first], counts) + spans(counts)
    other_rows = np.repeat(other.index.first[second], counts) + spans(counts)
    are_equal = _compare_rows(one, rows, other, other_rows)
    bounds = row_bounds(counts)
    unequal = np.concatenate([[0], np.cumsum(~are_equal)])
    chosen = np.flatnonzero(unequal[bounds[1:]] == unequal[bounds[:-1]])
    return [one.index.fqns[key] for key in first[chosen].tolist()]


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


def _compare_rows(one: Catalog, rows: Ints, other: Catalog, other_rows: Ints) -> NDArray[np.bool_]:
    """Whether each pair of chunks has the same box, and the same checksums."""
    a, b = one.index, other.index
    width = max(a.offset.shape[1], b.offset.shape[1])
    same_box = _equal_rows(a.offset[rows], b.offset[other_rows], width, 0) & _equal_rows(
        a.shape[rows], b.shape[other_rows], width, 1
    )
    p, q = one.places, other.places
    counts, other_counts = np.diff(p.first_sum)[rows], np.diff(q.first_sum)[other_rows]
    has_sums = (counts == other_counts) & (p.block_bytes == q.block_bytes)
    has_sums &= (counts > 0) | ((a.ndim[a.key_of[rows]] >= 0) & (volumes(a.shape[rows]) == 0))
    counts = np.where(has_sums, counts, 0)
    at = np.repeat(p.first_sum[rows], counts) + spans(counts)
    other_at = np.repeat(q.first_sum[other_rows], counts) + spans(counts)
    unequal = np.concatenate([[0], np.cumsum(p.sums[at] != q.sums[other_at])])
    bounds = row_bounds(counts)
    are_equal: NDArray[np.bool_] = (
        same_box & has_sums & (unequal[bounds[1:]] == unequal[bounds[:-1]])
    )
    return are_equal


def _equal_rows(one: Ints, other: Ints, width: int, fill: int) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (
        widen_table(one, width, fill) == widen_table(other, width, fill)
    ).all(axis=1)
    return same
