"""Which rank reads what for the others: against a byte by byte account."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.plan.shared_reads import (
    BLOCK_BYTES,
    LARGEST_BUCKET_BYTES,
    ReadShare,
    Wants,
    share_reads,
)

GRAIN = 1000
"""Ranges begin and end at multiples of this, which is no divisor of a block."""
FILE_BYTES = 1 << 40

Range = tuple[int, int, int, int]
"""Phase, entry, first and last grain (exclusive)."""


def wants_of(ranges: Sequence[Range]) -> Wants:
    phase, entry, low, high = np.array(ranges, dtype=np.int64).reshape(-1, 4).T
    file = entry % 2
    return Wants(phase, entry, low * GRAIN, high * GRAIN, file, entry * FILE_BYTES + low * GRAIN)


@st.composite
def offers(draw: st.DrawFn) -> list[list[Range]]:
    """Of each rank: ranges that do not overlap, some of them large, many of them the same."""
    cuts = draw(
        st.lists(st.sampled_from([0, 1, 7, 66, 70, 9_000, 20_000]), unique=True, min_size=2)
    )
    pieces = [
        (phase, entry, low, high)
        for phase in (0, 1)
        for entry in range(3)
        for low, high in zip(sorted(cuts)[:-1], sorted(cuts)[1:], strict=True)
    ]
    some = st.lists(st.sampled_from(pieces), unique=True).map(sorted)
    return draw(st.lists(some | st.just(pieces), min_size=1, max_size=5))


def wanters_of(ranges: Sequence[Sequence[Range]]) -> dict[tuple[int, int, int], set[int]]:
    """The ranks that want each grain of an entry, by phase, entry and number."""
    found: dict[tuple[int, int, int], set[int]] = defaultdict(set)
    for rank, some in enumerate(ranges):
        for phase, entry, low, high in some:
            for grain in range(low, high, 1 if high - low < 100 else 500):
                found[phase, entry, grain].add(rank)
    return found


def reader_of(share: ReadShare, phase: int, entry: int, byte: int) -> list[int]:
    """The ranks that read a byte for others, as far as one rank knows."""
    return [
        int(share.owner[row])
        for row in range(len(share))
        if share.phase[row] == phase
        for one, low, high in share.segments(row)
        if one == entry and low <= byte < high
    ]


@given(offers())
def test_each_byte_that_several_ranks_want_is_read_once_by_one_of_them(
    ranges: list[list[Range]],
) -> None:
    wanters = wanters_of(ranges)
    shares = share_reads([wants_of(some) for some in ranges])
    several = {grain for grain, ranks in wanters.items() if len(ranks) > 1}
    assert (shares is None) == (not several)
    for (phase, entry, grain), ranks in wanters.items() if shares is not None else ():
        readers = [reader_of(shares[rank], phase, entry, grain * GRAIN) for rank in sorted(ranks)]
        if len(ranks) > 1:
            assert all(one == readers[0] for one in readers)
            assert len(readers[0]) == 1
            assert readers[0][0] in ranks


@given(offers())
def test_all_ranks_see_the_same_buckets_of_bounded_size(ranges: list[list[Range]]) -> None:
    shares = share_reads([wants_of(some) for some in ranges]) or []
    seen: dict[int, object] = {}
    for rank, share in enumerate(shares):
        assert share.number.tolist() == sorted(set(share.number.tolist()))
        for row, number in enumerate(share.number.tolist()):
            segments = share.segments(row)
            assert rank in share.wanters(row)
            assert sum(high - low for _, low, high in segments) <= LARGEST_BUCKET_BYTES
            assert seen.setdefault(number, (segments, share.wanters(row))) == (
                segments,
                share.wanters(row),
            )


def test_all_ranks_read_about_as_much_where_all_want_all() -> None:
    whole = [wants_of([(1, entry, 0, 40_000) for entry in range(4)])] * 4
    shares = share_reads(whole)
    assert shares is not None
    nbytes = [0] * 4
    for row, owner in enumerate(shares[0].owner.tolist()):
        nbytes[owner] += sum(high - low for _, low, high in shares[0].segments(row))
    assert max(nbytes) - min(nbytes) <= LARGEST_BUCKET_BYTES
    assert sum(nbytes) == 4 * 40_000 * GRAIN


def test_a_rank_with_much_of_its_own_to_read_reads_little_for_others() -> None:
    both = (1, 0, 0, 20_000)
    shares = share_reads([wants_of([both, (1, 1, 0, 20_000)]), wants_of([both])])
    assert shares is not None
    assert set(shares[0].owner.tolist()) == {1}


def test_cuts_are_between_blocks() -> None:
    shares = share_reads([wants_of([(1, 0, 0, 9_000)])] * 3)
    assert shares is not None
    assert len(shares[0]) > 3
    assert (shares[0].low % BLOCK_BYTES == 0).all()


def test_too_little_is_not_shared() -> None:
    wants = [wants_of([(1, 0, 0, 10)])] * 2
    assert share_reads(wants, least_bytes=10 * GRAIN) is not None
    assert share_reads(wants, least_bytes=10 * GRAIN + 1) is None
