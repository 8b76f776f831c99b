"""Whose output a report shows, by --dcp-report-ranks."""

from __future__ import annotations

import pytest

from pytest_dcp._harness.controller.report import shown_ranks
from pytest_dcp._harness.world.outcome import combine
from pytest_dcp.errors import RankFailure

ALIKE = [RankFailure(rank, "failed", "call", at_s, "ValueError: boom") for rank, at_s in
         ((3, 1.0), (1, 2.0))]  # fmt: skip
ECHO = RankFailure(0, "blocked", "call", 3.0, "still in call")
ANOTHER = RankFailure(2, "failed", "call", 2.5, "KeyError: 'x'")


@pytest.mark.parametrize(
    ("which", "ranks"), [("all", {0, 1, 2, 3, 4}), ("failed", {1, 2, 3}), ("first", {3})]
)
def test_the_ranks_that_the_option_names_are_shown(which: str, ranks: set[int]) -> None:
    outcome = combine(5, {}, [*ALIKE, ECHO, ANOTHER])
    assert shown_ranks(outcome, 5, which) == ranks  # type: ignore[arg-type]  # one of the choices


@pytest.mark.parametrize("which", ["all", "failed", "first"])
def test_without_a_failure_every_rank_is_shown(which: str) -> None:
    assert shown_ranks(combine(0, {}, ()), 2, which) == {0, 1}  # type: ignore[arg-type]  # see above
