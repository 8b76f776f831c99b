"""Reads the bytes that several ranks want: each rank its buckets, which it sends to the others.

`SharedReads` carries out one rank's `ReadShare`. A `ByteChannel` moves the buckets; this module
reads them, and cuts those that arrive into segments for the receivers of this rank: targets
(`SegmentTargets`), or entries that are wanted whole. The rank that reads a byte checks it.

A box whose bytes are shared only in part is filled from segments alone: the other bytes are read as
buckets that no other rank gets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.io.bucket_reading import BucketLayout, BucketReader, BucketSource
from pytest_dcp._engine.io.checked_ranges import ByteCounts
from pytest_dcp._engine.io.copy_plan import Copies
from pytest_dcp._engine.io.read_copies import CopyRequest, read_copies
from pytest_dcp._engine.io.segment_targets import SegmentTargets
from pytest_dcp._engine.io.wanted_ranges import LoadPhase
from pytest_dcp._engine.plan.boxes import Ints, volumes
from pytest_dcp._engine.plan.shared_reads import (
    BLOCK_BYTES,
    LARGEST_BUCKET_BYTES,
    ReadShare,
    Wants,
)
from pytest_dcp.errors import CheckpointError

Take = Callable[[int, int, memoryview], None]
"""Takes a segment: entry, first byte, and the bytes, which are valid during the call."""


class ByteChannel(Protocol):
    """Moves buckets between the ranks that share reads; see coordinate.byte_exchange."""

    def run(
        self,
        outgoing: Any,
        receivers: Mapping[int, Collection[int]],
        expected: Mapping[int, int],
        deliver: Callable[[int, int, memoryview], None],
    ) -> None:
        """Send this rank's buckets and deliver all that it wants; returns when all is done."""


class SharedReads:
    """One rank's part in the shared reads of one load."""

    def __init__(self, rank: int, wants: Wants, share: ReadShare, channel: ByteChannel) -> None:
        self.rank = rank
        self._wants, self._share, self._channel = wants, share, channel
        self._segments = _by_entry(share)

    def covers(self, phase: LoadPhase, entry: int) -> bool:
        """Whether some bytes of this entry come from shared buckets."""
        return (int(phase), entry) in self._segments

    def read_entries(
        self, source: BucketSource, sizes: Mapping[int, int]
    ) -> tuple[dict[int, memoryview], ByteCounts]:
        """The whole entries of shared values. sizes: of the wanted entries, in bytes."""
        mine = {e: size for e, size in sizes.items() if self.covers(LoadPhase.VALUES, e)}
        found = {entry: memoryview(bytearray(size)) for entry, size in mine.items()}

        def take(entry: int, low: int, data: memoryview) -> None:
            if entry in found:
                found[entry][low : low + len(data)] = data
                source.observer.advance(len(data))

        return found, self._run(LoadPhase.VALUES, source, take)

    def fill(
        self, request: CopyRequest, whole: Mapping[int, Callable[[memoryview], None]]
    ) -> ByteCounts:
        """Fill the copies. whole: receivers of the entries that must be decoded."""
        is_shared = self._find_shared(request.copies, whole)
        shared = np.flatnonzero(is_shared)
        targets = SegmentTargets(request.items, request.copies, shared, request.catalog)
        entries = _WholeEntries(request.catalog.places.data_nbytes, whole)

        def take(entry: int, low: int, data: memoryview) -> None:
            if entry in whole:
                entries.take(entry, low, data)
                filled_bytes = len(data)
            else:
                filled_bytes = targets.fill(entry, low, data)
            request.observer.advance(filled_bytes)

        alone = np.flatnonzero(~is_shared)
        rest = replace(request, copies=_rows_of(request.copies, alone))
        source = BucketSource(
            request.folder, request.catalog, request.items, request.settings, request.observer
        )
        return self._run(LoadPhase.TENSORS, source, take, lambda: read_copies(rest))

    def _find_shared(self, copies: Copies, whole: Mapping[int, object]) -> NDArray[np.bool_]:
        """The copies that are filled from segments: they lie in a range that is shared in part."""
        wants = self._wants
        is_tensor = wants.phase == LoadPhase.TENSORS
        touched = [
            (entry, low, high)
            for entry, low, high in zip(
                wants.entry[is_tensor].tolist(),
                wants.low[is_tensor].tolist(),
                wants.high[is_tensor].tolist(),
                strict=True,
            )
            if entry not in whole and self._overlaps(LoadPhase.TENSORS, entry, low, high)
        ]
        if not touched:
            return np.zeros(len(copies), dtype=bool)
        entry, low, high = np.array(sorted(touched), dtype=np.int64).T
        # The wanted range in which each copy begins, if that one is shared.
        scale = int(max(high.max(), copies.from_start.max(initial=0))) + 1
        at = np.searchsorted(entry * scale + low, copies.entry * scale + copies.from_start, "right")
        near = np.maximum(at - 1, 0)
        found: NDArray[np.bool_] = (
            (at > 0)
            & (entry[near] == copies.entry)
            & (copies.from_start + _spans(copies) <= high[near])
            & (copies.nbytes > 0)
        )
        return found

    def _overlaps(self, phase: LoadPhase, entry: int, low: int, high: int) -> bool:
        pieces = self._segments.get((int(phase), entry), ())
        return any(a < high and b > low for a, b in pieces)

    def _run(
        self,
        phase: LoadPhase,
        source: BucketSource,
        take: Take,
        read_rest: Callable[[], ByteCounts] | None = None,
    ) -> ByteCounts:
        """Read, send and receive the buckets of a phase."""
        share, rows = self._share, np.flatnonzero(self._share.phase == phase).tolist()
        layouts = {int(share.number[n]): BucketLayout.of(int(share.number[n]), share.segments(n))
                   for n in rows}  # fmt: skip
        owners = {int(share.number[n]): int(share.owner[n]) for n in rows}
        own = [number for number, owner in owners.items() if owner == self.rank]
        receivers = {
            int(share.number[n]): [rank for rank in share.wanters(n) if rank != self.rank]
            for n in rows
            if share.owner[n] == self.rank
        }
        for layout in self._layouts_alone(phase):
            layouts[layout.number], owners[layout.number] = layout, self.rank
            own.append(layout.number)
        expected = Counter(owner for owner in owners.values() if owner != self.rank)
        if not layouts:
            return ByteCounts() if read_rest is None else read_rest()
        reader = BucketReader(source, [layouts[number] for number in own], read_rest)

        def deliver(rank: int, number: int, data: memoryview) -> None:
            layout = layouts.pop(number, None)
            if layout is None or owners[number] != rank or len(data) != layout.nbytes:
                raise CheckpointError(
                    f"rank {rank} sent {len(data)} bytes as bucket {number}, which is not what "
                    f"rank {self.rank} expects from it"
                )
            for (entry, low, high), at in zip(layout.segments, layout.offsets, strict=True):
                take(entry, low, data[at : at + high - low])

        try:
            self._channel.run(reader, receivers, expected, deliver)
        finally:
            reader.close()
        return reader.tally

    def _layouts_alone(self, phase: LoadPhase) -> Iterator[BucketLayout]:
        """Buckets of the bytes that this rank alone wants beside shared ones, below number 0."""
        number = -1
        wants = self._wants
        for n in np.flatnonzero(wants.phase == phase).tolist():
            entry, low, high = int(wants.entry[n]), int(wants.low[n]), int(wants.high[n])
            if not self._overlaps(phase, entry, low, high):
                continue
            for a, b in gaps(self._segments[int(phase), entry], low, high):
                for start, stop in _cut(a, b):
                    yield BucketLayout.of(number, [(entry, start, stop)])
                    number -= 1


class _WholeEntries:
    """Entries that are put together from segments, each handed over once it is whole."""

    def __init__(self, nbytes: Ints, receivers: Mapping[int, Callable[[memoryview], None]]) -> None:
        self._nbytes, self._receivers = nbytes, receivers
        self._parts: dict[int, tuple[bytearray, int]] = {}
        """By entry: its bytes so far, and how many are missing."""

    def take(self, entry: int, low: int, data: memoryview) -> None:
        size = int(self._nbytes[entry])
        room, missing = self._parts.get(entry) or (bytearray(size), size)
        room[low : low + len(data)] = data
        missing -= len(data)
        self._parts[entry] = room, missing
        if not missing:
            del self._parts[entry]
            self._receivers[entry](memoryview(room))


def _by_entry(share: ReadShare) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The shared ranges of each entry, by phase and entry; ascending."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    counts = np.diff(share.first)
    phase = np.repeat(share.phase, counts).tolist()
    columns = (phase, share.entry.tolist(), share.low.tolist(), share.high.tolist())
    for when, entry, low, high in zip(*columns, strict=True):
        found.setdefault((when, entry), []).append((low, high))
    for ranges in found.values():
        ranges.sort()
    return found


def gaps(ranges: Sequence[tuple[int, int]], low: int, high: int) -> Iterator[tuple[int, int]]:
    """The parts of `low` to `high` that these ranges, which ascend, do not cover.

    >>> list(gaps([(0, 2), (5, 6)], 1, 9))
    [(2, 5), (6, 9)]
    """
    for start, stop in ranges:
        if low < min(start, high):
            yield low, min(start, high)
        low = max(low, stop)
    if low < high:
        yield low, high


def _cut(low: int, high: int) -> Iterator[tuple[int, int]]:
    """A range in parts of a bucket's size, cut between blocks."""
    while low < high:
        stop = min(high, (low + LARGEST_BUCKET_BYTES) // BLOCK_BYTES * BLOCK_BYTES)
        yield low, stop
        low = stop


def _spans(copies: Copies) -> Ints:
    """Bytes from the first byte of each box to its last, inclusive, in its entry's data."""
    itemsize = copies.nbytes // np.maximum(volumes(copies.shape), 1)
    inner: Ints = ((copies.shape - 1) * copies.from_stride).sum(axis=1, dtype=np.int64)
    return inner + itemsize


def _rows_of(copies: Copies, rows: Ints) -> Copies:
    columns = ("row", "entry", "shape", "from_stride", "from_start", "to_stride", "address",
               "nbytes", "flat")  # fmt: skip
    target = [copies.target[row] for row in rows.tolist()]
    return Copies(**{name: getattr(copies, name)[rows] for name in columns}, target=target)
