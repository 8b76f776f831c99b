"""Read items -> the ranges of bytes that a rank offers to share. Pure (no I/O).

A box of a tensor wants the bytes from its first element to its last, gaps and all, unless the gaps
are nearly everything. A value, or an entry that must be decoded, is wanted whole.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.small_reads import SPARSE
from pytest_dcp._engine.io.stored_items import StoredItems
from pytest_dcp._engine.plan.boxes import Ints, strides_of, volumes, widen_table
from pytest_dcp._engine.plan.shared_reads import Wants


class LoadPhase(IntEnum):
    """When a load reads a range: shared ranges are read by all ranks in the same phase."""

    VALUES = 0
    """Before any target is filled."""
    TENSORS = 1


def offer_ranges(stored: StoredItems, values: Ints, whole: Ints, tensors: Ints) -> Wants:
    """The ranges of these rows. whole: tensors whose entries must be decoded."""
    entries, places = stored.items.entry, stored.catalog.places
    parts = []
    for phase, rows in ((LoadPhase.VALUES, values), (LoadPhase.TENSORS, whole)):
        entry = np.unique(entries[rows])
        parts.append(_columns(phase, entry, np.zeros_like(entry), places.data_nbytes[entry]))
    low, high, is_offered = box_ranges(stored, tensors)
    entry = entries[tensors][is_offered]
    parts.append(_columns(LoadPhase.TENSORS, *_join(entry, low[is_offered], high[is_offered])))
    phase, entry, low, high = np.concatenate(parts, axis=1)
    is_stored = (places.file[entry] >= 0) & (places.data_start[entry] >= 0) & (low < high)
    phase, entry, low, high = (column[is_stored] for column in (phase, entry, low, high))
    file = places.file[entry].astype(np.int64)
    return Wants(phase, entry, low, high, file, places.data_start[entry] + low)


def box_ranges(stored: StoredItems, rows: Ints) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """First and last byte (exclusive) of the box of each row in its entry's data, and whether it
    can be filled from a range: the entry is row-major and the box not too sparse.
    """
    items, index = stored.items, stored.catalog.index
    entry, shape, width = items.entry[rows], items.shape[rows], items.shape.shape[1]
    itemsize = index.itemsize[index.key_of[entry]]
    stored_shape = widen_table(index.shape[entry][:, :width], width, 1)
    stride = strides_of(stored_shape) * itemsize[:, None]
    low = (items.from_offset[rows] * stride).sum(axis=1, dtype=np.int64)
    nbytes = volumes(shape) * itemsize
    span = ((shape - 1) * stride).sum(axis=1, dtype=np.int64) + itemsize
    is_offered = (nbytes > 0) & (nbytes * SPARSE >= span)
    if stored.found.odd_strides:
        is_offered &= ~np.isin(entry, _column_major(stored))
    return low, low + span, is_offered


def _column_major(stored: StoredItems) -> list[int]:
    """The entries that are not stored row-major."""
    return [
        entry
        for entry, stride in stored.found.odd_strides.items()
        if not _is_row_major(stored.catalog, entry, stride)
    ]


def _is_row_major(catalog: Catalog, entry: int, stride: tuple[int, ...]) -> bool:
    shape = catalog.index.shape[entry, : len(stride)]
    itemsize = int(catalog.index.itemsize[catalog.index.key_of[entry]])
    expected = strides_of(shape[None, :])[0] * itemsize
    return bool(((shape == 1) | (expected == np.array(stride, dtype=np.int64))).all())


def _columns(phase: int, entry: Ints, low: Ints, high: Ints) -> Ints:
    """(4, n)"""
    return np.stack((np.full_like(entry, phase), entry.astype(np.int64), low, high))


def _join(entry: Ints, low: Ints, high: Ints) -> tuple[Ints, Ints, Ints]:
    """The ranges with those of one entry that overlap or touch joined.

    >>> columns = _join(np.array([7, 3, 7]), np.array([4, 0, 0]), np.array([8, 9, 4]))
    >>> [column.tolist() for column in columns]
    [[3, 7], [0, 0], [9, 8]]
    """
    if not len(entry):
        return entry, low, high
    order = np.lexsort((low, entry))
    entry, low, high = entry[order], low[order], high[order]
    # One line for all entries, each behind the last, so that one running maximum serves them all.
    base = np.unique(entry, return_inverse=True)[1].astype(np.int64) * (int(high.max()) + 1)
    reached = np.maximum.accumulate(base + high)
    new = np.ones(len(entry), dtype=bool)
    new[1:] = (np.diff(entry) != 0) | (base[1:] + low[1:] > reached[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(entry)) - 1
    return entry[first], low[first], reached[last] - base[last]
