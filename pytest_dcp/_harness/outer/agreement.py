"""Do all ranks have the same tests? Their collections -> a sentence for the user. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pytest_dcp._harness.outer.seat_messages import SeatJoin
from pytest_dcp.rank_names import ranks_text

MOST_NAMED = 3
"""Tests that one sentence names."""


def find_disagreement(joins: Mapping[int, SeatJoin]) -> str:
    """Which ranks collected other tests than rank 0, and which; empty if all have the same.

    The order of the tests may differ: controller and ranks find a test by its name.
    """
    # What rank 0 could not collect either is in its own report.
    others = joins.items() if not joins[0].problem else ()
    failed = {rank: join.problem for rank, join in others if join.problem}
    expected = dict(joins[0].tests)
    by_difference: dict[str, list[int]] = {}
    for rank, join in sorted(joins.items()):
        text = _difference(expected, dict(join.tests))
        if text:
            by_difference.setdefault(text, []).append(rank)
    sentences = [f"{ranks_text(ranks)} {text}" for text, ranks in by_difference.items()]
    if not sentences and not failed:
        return ""
    parts = [f"the ranks must collect the same tests, but {'; '.join(sentences)}"]
    if not sentences:
        parts.clear()
    parts += [f"rank {rank}: {text}" for rank, text in sorted(failed.items())]
    return "\n".join(parts)


def _difference(expected: Mapping[str, str], actual: Mapping[str, str]) -> str:
    missing = [name for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected]
    other = [name for name in actual if actual[name] != expected.get(name, actual[name])]
    parts = []
    if missing:
        parts.append(f"lacked {_some(missing)}")
    if extra:
        parts.append(f"also had {_some(extra)}")
    if other:
        name = other[0]
        parts.append(
            f"had {name} with {actual[name] or 'no world'}, and rank 0 with "
            f"{expected[name] or 'no world'}"
        )
    return " and ".join(parts)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - MOST_NAMED
    first_ones = ", ".join(listed[:MOST_NAMED])
    return f"{first_ones} and {more} more" if more > 0 else first_ones
