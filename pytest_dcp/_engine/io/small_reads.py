"""Reading small parts of a file, many at a time: most tensors of a model are small.

A part is small if it is one run of at most a block in the file and in memory, and is checked by one
sum or none. Adjacent parts are copied out of one window of the file, or read by one call of its
disk. All reads are in the file's order, since the disks of object stores read ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import pairwise
from operator import add

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import BLOCK_BYTES, Catalog
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.io.checked_ranges import ByteCounts, RangeReader, Verify
from pytest_dcp._engine.io.copy_plan import Copies
from pytest_dcp._engine.io.tensor_memory import memory_at
from pytest_dcp._engine.plan.boxes import Ints

FEW = 16
"""Fewer parts are not worth a window."""
BATCH = 256
"""Parts of one window."""
AT_A_TIME = 64
"""Parts that are read, and then summed while in the core's cache, between two checks whether to go
on."""
SPARSE = 16
"""At least this fraction of a window must be wanted, since its gaps are mapped too."""
LOOSE = 2
"""At least this fraction must be wanted of a batch that is fetched by few requests."""


class ReadKind(IntEnum):
    """How a part is read."""

    ALONE = 0
    """Not small."""
    BLOCK = 1
    """A whole chunk, with its only sum."""
    UNCHECKED = 2
    """Small, and either without a sum or not to be checked."""


def split_by_read_kind(
    catalog: Catalog, copies: Copies, rows: Ints, verify: Verify
) -> Iterator[tuple[ReadKind, Ints]]:
    """The rows in their order, cut where the kind changes; a single odd row between others goes
    with them."""
    kind = _kinds(catalog, copies, rows, verify)
    if (kind == ReadKind.ALONE).any():
        lengths = np.diff(_cuts(kind))
        kind[np.repeat(lengths == 1, lengths)] = ReadKind.ALONE
    for start, stop in pairwise(_cuts(kind)):
        yield ReadKind(kind[start]), rows[start:stop]


def _kinds(catalog: Catalog, copies: Copies, rows: Ints, verify: Verify) -> NDArray[np.int8]:
    places, entry = catalog.places, copies.entry[rows]
    nbytes, have = copies.nbytes[rows], places.data_nbytes[entry]
    sums = places.first_sum[entry + 1] - places.first_sum[entry]
    checked = (sums > 0) & (verify != "off")
    small = copies.flat[rows] & (nbytes <= min(places.block_bytes, BLOCK_BYTES))
    small &= copies.from_start[rows] + nbytes <= have
    kind = np.full(len(rows), ReadKind.ALONE, dtype=np.int8)
    # A sum covers its block: a part of the block cannot be verified by itself.
    kind[small & checked & (sums == 1) & (nbytes == have)] = ReadKind.BLOCK
    kind[small & ~checked] = ReadKind.UNCHECKED
    return kind


def _cuts(kind: NDArray[np.int8]) -> list[int]:
    """Where each stretch of one kind begins, and the end of the last."""
    return [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]


def read_together(
    reader: RangeReader, copies: Copies, rows: Ints, kind: ReadKind, window_bytes: int
) -> None:
    """Fill these copies' parts of their targets, all of one kind and not `ALONE`.

    Raises CheckpointCorruptError where the file is too short or a checksum differs.
    """
    places = reader.catalog.places
    for at in range(0, len(rows), BATCH):
        batch = rows[at : at + BATCH]
        entry, low = copies.entry[batch], copies.from_start[batch]
        place, nbytes = (places.data_start[entry] + low).tolist(), copies.nbytes[batch].tolist()
        # Raw memory: `copies` has checked that each box is one run inside its target.
        views = list(map(memory_at, copies.address[batch].tolist(), nbytes))
        first_sum = places.first_sum[entry]
        sums = places.sums[first_sum].tolist() if kind is ReadKind.BLOCK else None
        total, span = sum(nbytes), max(map(add, place, nbytes)) - place[0]
        # A file without sums may not be ours, and may be truncated while it is mapped.
        ours = bool((places.first_sum[entry + 1] > first_sum).all())
        worth = len(batch) >= FEW and span <= window_bytes and total * SPARSE >= span
        window = reader.file.window(place[0], span) if ours and worth else None
        # If nothing needs a checksum and the gaps are small, one call may read everything.
        step = BATCH if sums is None and total * LOOSE >= span else AT_A_TIME
        for start in range(0, len(batch), step):
            some = slice(start, start + step)
            wanted_bytes = sum(nbytes[some])
            # Another thread may have failed: then the load is over.
            reader.stop.check()
            if window is None:
                read_bytes = reader.file.read_rows(place[some], views[some])
            else:
                read_bytes = _copy_out(
                    window, [where - place[0] for where in place[some]], views[some]
                )
            right = read_bytes == wanted_bytes
            if right and sums is not None:
                right = list(map(crc32, views[some])) == sums[some]
            if right:
                reader.tally.add(ByteCounts(wanted_bytes, wanted_bytes if sums is not None else 0))
                reader.observer.advance(wanted_bytes)
                continue
            # Read again, one by one, to report which part is wrong.
            for part_entry, low_, view in zip(entry[some], low[some], views[some], strict=True):
                reader.read(int(part_entry), int(low_), view)
        window = None  # otherwise it would stay until the next one exists


def _copy_out(window: memoryview, starts: Sequence[int], views: Sequence[memoryview]) -> int:
    for start, view in zip(starts, views, strict=True):
        view[:] = window[start : start + len(view)]
    return sum(map(len, views))
