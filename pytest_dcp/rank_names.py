"""Ranks as errors and reports name them. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Iterable

MOST_RUNS = 8


def rank_runs(ranks: Iterable[int]) -> list[str]:
    """The ranks, ascending, with runs of successive ones joined: `["0-2", "5"]`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return [f"{low}" if low == high else f"{low}-{high}" for low, high in runs]


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2,5`."""
    found = rank_runs(ranks)
    one = len(found) == 1 and "-" not in found[0]
    return f"rank{'' if one else 's'} {','.join(found)}"


def some_ranks_text(ranks: Iterable[int]) -> str:
    """As `ranks_text`, with spaces, and at most `MOST_RUNS` runs: `ranks 0-2, 5`."""
    found = rank_runs(ranks)
    one = len(found) == 1 and "-" not in found[0]
    more = ", ..." if len(found) > MOST_RUNS else ""
    return f"rank{'' if one else 's'} {', '.join(found[:MOST_RUNS])}{more}"
