"""Wanted boxes x stored boxes -> what to read. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import islice

import numpy as np

from pytest_dcp._engine.plan.boxes import Ints, intersect, spans, volumes, widen_table
from pytest_dcp._engine.plan.columns import READ_BYTES, READ_TENSOR, UNKNOWN, ReadItems
from pytest_dcp._engine.plan.coverage import overlaps
from pytest_dcp._engine.plan.describe import Wanted
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError

PAIRS_AT_ONCE = 1 << 20
"""Pairs of a wanted and a stored box that are intersected at a time: bounds the memory."""


def read_items(
    wanted: Wanted,
    index: Index,
    stored_as: Mapping[str, str] | None = None,
    *,
    partial: Container[str] = (),
) -> ReadItems:
    """One row for each overlap of a wanted box with a stored one.

    Every wanted name must be in the index, under the name that `stored_as` gives for it. Raises
    CheckpointCorruptError when the stored boxes lack an element that is wanted, or hold one twice.
    Of the names in `partial` they may lack any.
    """
    width = max(wanted.offset.shape[1], index.offset.shape[1])
    names = wanted.fqns
    stored_fqns = names if stored_as is None else tuple(stored_as.get(n, n) for n in names)
    key = np.array([index.row_of[fqn] for fqn in stored_fqns], dtype=np.int64)
    want_offset, want_shape = (
        widen_table(wanted.offset, width, 0),
        widen_table(wanted.shape, width, 1),
    )
    have_offset, have_shape = (
        widen_table(index.offset, width, 0),
        widen_table(index.shape, width, 1),
    )
    _check_apart(index, key)
    counts = np.diff(index.first)[key]
    parts = []
    for rows in _slabs(counts):
        want = np.repeat(rows, counts[rows])
        have = index.first[key[want]] + spans(counts[rows])
        low, shape, shared = intersect(
            want_offset[want], want_shape[want], have_offset[have], have_shape[have]
        )
        parts.append((want[shared], have[shared], low[shared], shape[shared]))
    want, have, low, shape = _concatenate_copies(parts, width)
    tensors = wanted.ndim[want] >= 0
    _check_filled(wanted, want[tensors], shape[tensors], partial)
    fqns = tuple(names[row] for row in want.tolist())
    renamed = stored_fqns is not names
    return ReadItems(
        fqns=fqns,
        stored_fqns=tuple(stored_fqns[row] for row in want.tolist()) if renamed else fqns,
        kind=np.where(tensors, READ_TENSOR, READ_BYTES).astype(np.int8),
        ndim=wanted.ndim[want],
        wanted=want_offset[want],
        wanted_hint=np.where(tensors, wanted.nth[want], UNKNOWN),
        to_offset=low - want_offset[want],
        stored=have_offset[have],
        stored_hint=np.where(tensors, have - index.first[key[want]], UNKNOWN),
        from_offset=low - have_offset[have],
        shape=shape,
        entry=have,
        source=index,
    )


def _slabs(counts: Ints) -> list[Ints]:
    slab = (counts.cumsum() - counts) // PAIRS_AT_ONCE
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(slab)) + 1)


def _concatenate_copies(
    parts: Sequence[tuple[Ints, Ints, Ints, Ints]], width: int
) -> tuple[Ints, Ints, Ints, Ints]:
    none, nothing = np.zeros(0, dtype=np.int64), np.zeros((0, width), dtype=np.int64)
    empty = (none, none, nothing, nothing)
    want, have, low, shape = (
        np.concatenate(columns) for columns in zip(*parts, empty, strict=True)
    )
    return want, have, low, shape


class Everything(Container[str]):
    """Contains every name."""

    def __contains__(self, _: object) -> bool:
        return True


def _check_filled(wanted: Wanted, want: Ints, shape: Ints, partial: Container[str]) -> None:
    """Raise unless the overlaps fill each wanted box exactly."""
    filled = np.zeros(len(wanted), dtype=np.int64)
    np.add.at(filled, want, volumes(shape))
    asked = np.where(wanted.ndim >= 0, volumes(wanted.shape), 0)
    gaps = (row for row in np.flatnonzero(filled != asked) if wanted.fqns[row] not in partial)
    for row in islice(gaps, 1):
        shown = tuple(wanted.shape[row, : wanted.ndim[row]].tolist())
        offset = tuple(wanted.offset[row, : wanted.ndim[row]].tolist())
        raise CheckpointCorruptError(
            f"{filled[row]} of {asked[row]} elements of the part of shape {shown} at offset "
            f"{offset} are stored: the stored chunks leave a gap",
            entry=wanted.fqns[row],
        )


def _check_apart(index: Index, key: Ints) -> None:
    """Raise where stored chunks of a wanted key overlap: a gap elsewhere would go unnoticed."""
    asked = np.zeros(len(index), dtype=bool)
    asked[key] = True
    for at, one, other in overlaps(index, only=asked)[:1]:
        raise CheckpointCorruptError(
            f"its stored chunks overlap: {index.chunk(one)} and {index.chunk(other)}",
            entry=index.fqns[at],
        )
