"""Bytes that several ranks want: which rank reads them for all. Pure (no I/O).

Theory of operation
-------------------

Each rank offers the ranges that it wants (`Wants`): bytes of an entry's data, as half-open ranges
from its start. All ranks have opened the same checkpoint, so a row of its index means the same
entry on each. The coordinator finds the ranges that at least two ranks want, cuts them into
buckets of bounded size in the order of the files, and gives each bucket to the rank among its
wanters that has the fewest bytes to read so far. Each rank gets the buckets that it wants
(`ReadShare`): it reads its own and sends them to the other wanters, and receives the rest.

Bytes that one rank alone wants stay with that rank and are not mentioned.

Ranks 0 and 1 want entry 0, of 300 kB; rank 1 also wants 100 bytes of entry 1:

>>> def wants(*ranges):
...     entry, low, high = (np.array(column, dtype=np.int64) for column in zip(*ranges))
...     none = np.zeros_like(entry)
...     return Wants(none, entry, low, high, none, entry * 1_000_000 + low)
>>> shares = share_reads([wants((0, 0, 300_000)), wants((0, 0, 300_000), (1, 0, 100))])
>>> for number, owner in enumerate(shares[1].owner.tolist()):
...     print(owner, shares[1].segments(number))
0 [(0, 0, 262144)]
1 [(0, 262144, 300000)]
>>> shares[1].wanters(0)
(0, 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.plan.boxes import Ints

BLOCK_BYTES = 1 << 16
"""Ranges are cut at multiples of this from the entry's start: blocks with a checksum of their own
stay whole, and so does every element."""
SMALLEST_BUCKET_BYTES, LARGEST_BUCKET_BYTES = 4 * BLOCK_BYTES, 63 * BLOCK_BYTES
"""A request and a message cost as much as some 100 kB. Buckets of 4 MiB gain nothing more, and a
message of up to 4 MiB is received without being copied (`coordinate.frame`)."""
RECEIVED_BYTES = 64 << 20
"""Memory of a rank for buckets that arrive: one from each other rank at a time."""
BUCKETS_OF_A_RANK = 32
"""At least this many if there is enough to read: several threads read one each, and all the same
reading and sending overlap."""
DENSE = 0.75
"""Ranges of one entry that overlap this much are shared as one, with a few bytes that some ranks
do not need: columns of a row-major tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Wants:
    """Ranges of bytes that one rank wants, one row each; rows of one entry do not overlap."""

    phase: Ints
    """Of the load: ranges of different phases are not shared."""
    entry: Ints
    """Row of the catalog."""
    low: Ints
    """First byte, from the start of the entry's data."""
    high: Ints
    """Last byte, exclusive."""
    file: Ints
    """Position among the checkpoint's files."""
    start: Ints
    """Bytes from the file's start to `low`."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadShare:
    """The buckets that one rank wants and that others want, too: n buckets of segments."""

    number: Ints
    """(n,) of each bucket, the same on every rank; ascending."""
    phase: Ints
    """(n,)"""
    owner: Ints
    """(n,) the rank that reads it."""
    wanted_by: Ints
    """(n,) positions in `groups`."""
    groups: tuple[tuple[int, ...], ...]
    """Sets of ranks that want a bucket, the owner among them; ascending."""
    first: Ints
    """(n + 1,) segments of bucket i are first[i] to first[i + 1] - 1."""
    entry: Ints
    """Of each segment."""
    low: Ints
    high: Ints

    def __len__(self) -> int:
        return len(self.number)

    def segments(self, row: int) -> list[tuple[int, int, int]]:
        """Entry, first and last byte (exclusive) of each segment of a bucket."""
        some = slice(int(self.first[row]), int(self.first[row + 1]))
        columns = (self.entry[some], self.low[some], self.high[some])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def wanters(self, row: int) -> tuple[int, ...]:
        """The ranks that want a bucket."""
        return self.groups[int(self.wanted_by[row])]


@dataclass(frozen=True, slots=True, eq=False)
class _Ranges:
    """Ranges that several ranks want, in the order of the files."""

    phase: Ints
    entry: Ints
    low: Ints
    high: Ints
    file: Ints
    start: Ints
    is_wanted: NDArray[np.bool_]
    """(n, ranks)"""


def share_reads(offers: Sequence[Wants], least_bytes: int = 1) -> list[ReadShare] | None:
    """Each rank's share; None if sharing saves fewer than `least_bytes` of reading."""
    ranges = _find_shared(offers)
    nbytes = ranges.high - ranges.low
    saved_bytes = int((nbytes * (ranges.is_wanted.sum(axis=1) - 1)).sum())
    if not len(nbytes) or saved_bytes < least_bytes:
        return None
    load_bytes = np.array([int((one.high - one.low).sum()) for one in offers], dtype=np.int64)
    load_bytes -= (ranges.is_wanted * nbytes[:, None]).sum(axis=0)
    groups, wanted_by = _group_sets(ranges.is_wanted)
    limit_bytes = _bucket_bytes(int(nbytes.sum()), len(offers))
    buckets = list(_cut_buckets(ranges, wanted_by, limit_bytes))
    whole = _assign_owners(buckets, groups, load_bytes.tolist())
    return [_share_of(rank, whole) for rank in range(len(offers))]


def _bucket_bytes(shared_bytes: int, ranks: int) -> int:
    """The limit of a bucket: a multiple of a block."""
    fair = min(shared_bytes // (BUCKETS_OF_A_RANK * ranks), RECEIVED_BYTES // max(ranks - 1, 1))
    limit = min(max(fair, SMALLEST_BUCKET_BYTES), LARGEST_BUCKET_BYTES)
    return limit // BLOCK_BYTES * BLOCK_BYTES


# Which ranges are shared.


def _find_shared(offers: Sequence[Wants]) -> _Ranges:
    """The ranges that at least two ranks want."""
    rank = np.repeat(np.arange(len(offers)), [len(one.entry) for one in offers])
    names = ("phase", "entry", "low", "high", "file", "start")
    columns = [np.concatenate([getattr(one, name) for one in offers]) for name in names]
    order = np.lexsort((rank, columns[3], columns[2], columns[1], columns[0]))
    rank = rank[order]
    phase, entry, low, high, file, start = (column[order] for column in columns)
    cuts = np.flatnonzero((np.diff(phase) != 0) | (np.diff(entry) != 0)) + 1
    edges = np.unique(np.concatenate(([0], cuts, [len(entry)])))
    first, count = edges[:-1], np.diff(edges)
    # Nearly always all ranks want the same of an entry: then no entry is looked at by itself.
    is_same = np.ones(len(first), dtype=bool)
    for column in (low, high) if len(first) else ():
        is_same &= np.minimum.reduceat(column, first) == np.maximum.reduceat(column, first)
    same = np.flatnonzero(is_same & (count > 1))
    rows, masks = [], []
    for a, b in zip(first[~is_same].tolist(), edges[1:][~is_same].tolist(), strict=True):
        for lo, hi, ranks in _overlaps(low[a:b], high[a:b], rank[a:b]):
            mask = np.zeros(len(offers), dtype=bool)
            mask[ranks] = True
            rows.append((a, lo, hi))
            masks.append(mask)
    odd_at, odd_low, odd_high = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    table = np.zeros((len(same) + len(rows), len(offers)), dtype=bool)
    group = np.repeat(np.arange(len(first)), count)
    position = np.full(len(first), -1)
    position[same] = np.arange(len(same))
    is_row = position[group] >= 0
    table[position[group][is_row], rank[is_row]] = True
    table[len(same) :] = np.array(masks, dtype=bool).reshape(-1, len(offers))
    at = np.concatenate((first[same], odd_at))
    lows = np.concatenate((low[first[same]], odd_low))
    highs = np.concatenate((high[first[same]], odd_high))
    places = start[at] - low[at] + lows
    ordered = np.lexsort((places, file[at], phase[at]))
    found = _Ranges(phase[at], entry[at], lows, highs, file[at], places, table)
    return _Ranges(*(getattr(found, name)[ordered] for name in _Ranges.__slots__))


def _overlaps(low: Ints, high: Ints, rank: Ints) -> Iterator[tuple[int, int, Ints]]:
    """The parts of one entry that several ranks want, and these ranks; rows ascend by `low`."""
    if (low == low[0]).all() and (high == high[0]).all():
        yield int(low[0]), int(high[0]), rank
        return
    if (low[1:] >= np.maximum.accumulate(high)[:-1]).all():
        return  # disjoint
    union = int(high.max() - low.min())
    one_each = len(np.unique(rank)) == len(rank)
    if one_each and int((high - low).sum()) >= DENSE * union * len(rank):
        yield int(low.min()), int(high.max()), np.sort(rank)
        return
    edges = np.unique(np.concatenate((low, high)))
    for a, b in pairwise(edges.tolist()):
        ranks = rank[(low <= a) & (high >= b)]
        if len(ranks) > 1:
            yield a, b, np.sort(ranks)


def _group_sets(is_wanted: NDArray[np.bool_]) -> tuple[tuple[tuple[int, ...], ...], Ints]:
    """The distinct sets of ranks, and each row's."""
    packed = np.ascontiguousarray(np.packbits(is_wanted, axis=1))
    as_one = packed.view(f"V{packed.shape[1]}").ravel()
    _, first, row_sets = np.unique(as_one, return_index=True, return_inverse=True)
    groups = tuple(tuple(np.flatnonzero(is_wanted[row]).tolist()) for row in first.tolist())
    return groups, row_sets.reshape(-1).astype(np.int64)


# Buckets.


@dataclass(slots=True)
class _Bucket:
    phase: int
    wanted_by: int
    nbytes: int
    segments: list[tuple[int, int, int]]


def _cut_buckets(ranges: _Ranges, wanted_by: Ints, limit_bytes: int) -> Iterator[_Bucket]:
    """The ranges in buckets: neighbours that the same ranks want go together."""
    bucket: _Bucket | None = None
    columns = (ranges.phase, wanted_by, ranges.file, ranges.entry, ranges.low, ranges.high)
    last_file = -1
    for phase, group, file, entry, low, high in zip(*(c.tolist() for c in columns), strict=True):
        if bucket is not None and (bucket.phase, bucket.wanted_by, last_file) != (
            phase, group, file,
        ):  # fmt: skip
            yield bucket
            bucket = None
        last_file = file
        while low < high:
            bucket = bucket or _Bucket(phase, group, 0, [])
            end = _end_of_segment(low, high, limit_bytes - bucket.nbytes)
            if end > low:
                bucket.segments.append((entry, low, end))
                bucket.nbytes += end - low
            if end < high:
                yield bucket
                bucket = None
            low = end
    if bucket is not None:
        yield bucket


def _end_of_segment(low: int, high: int, room: int) -> int:
    """Where a segment that begins at `low` ends: after at most `room` bytes, at a block's end."""
    return high if high - low <= room else max(low, (low + room) // BLOCK_BYTES * BLOCK_BYTES)


def _assign_owners(
    buckets: Sequence[_Bucket], groups: tuple[tuple[int, ...], ...], load_bytes: list[int]
) -> ReadShare:
    """All buckets, each with an owner: the wanter with the least to read so far."""
    owners = []
    for bucket in buckets:
        owner = min(groups[bucket.wanted_by], key=load_bytes.__getitem__)
        load_bytes[owner] += bucket.nbytes
        owners.append(owner)
    segments = [segment for bucket in buckets for segment in bucket.segments]
    entry, low, high = np.array(segments, dtype=np.int64).reshape(-1, 3).T.copy()
    counts = [len(bucket.segments) for bucket in buckets]
    return ReadShare(
        number=np.arange(len(buckets)),
        phase=np.array([bucket.phase for bucket in buckets], dtype=np.int64),
        owner=np.array(owners, dtype=np.int64),
        wanted_by=np.array([bucket.wanted_by for bucket in buckets], dtype=np.int64),
        groups=groups,
        first=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
        entry=entry,
        low=low,
        high=high,
    )


def _share_of(rank: int, whole: ReadShare) -> ReadShare:
    """The buckets that a rank wants."""
    of_group = np.array([rank in group for group in whole.groups], dtype=bool)
    mine = of_group[whole.wanted_by]
    counts = np.diff(whole.first)
    segments = np.repeat(mine, counts)
    return ReadShare(
        number=whole.number[mine],
        phase=whole.phase[mine],
        owner=whole.owner[mine],
        wanted_by=whole.wanted_by[mine],
        groups=whole.groups,
        first=np.concatenate(([0], np.cumsum(counts[mine], dtype=np.int64))),
        entry=whole.entry[segments],
        low=whole.low[segments],
        high=whole.high[segments],
    )
