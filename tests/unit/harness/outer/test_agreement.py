"""Differences between the ranks' collections, in words."""

from __future__ import annotations

from pytest_dcp._harness.outer.agreement import find_disagreement
from pytest_dcp._harness.outer.seat_messages import SeatJoin


def join(rank: int, tests: dict[str, str], problem: str = "") -> SeatJoin:
    return SeatJoin("token", rank, "node", "machine", "name", tuple(tests.items()), problem)


def test_equal_collections_agree_in_any_order() -> None:
    joins = {0: join(0, {"a": "", "b": "w"}), 1: join(1, {"b": "w", "a": ""})}
    assert find_disagreement(joins) == ""


def test_missing_and_further_tests_are_named_with_their_ranks() -> None:
    joins = {
        0: join(0, {"a": "", "b": ""}),
        1: join(1, {"a": ""}),
        2: join(2, {"a": ""}),
        3: join(3, {"a": "", "b": "", "c": ""}),
    }
    assert find_disagreement(joins) == (
        "the ranks must collect the same tests, but ranks 1-2 lacked b; rank 3 also had c"
    )


def test_long_lists_are_cut() -> None:
    joins = {0: join(0, {}), 1: join(1, dict.fromkeys("abcde", ""))}
    assert find_disagreement(joins).endswith("rank 1 also had a, b, c and 2 more")


def test_another_world_of_the_same_test_is_a_difference() -> None:
    joins = {0: join(0, {"a": "a world of 2"}), 1: join(1, {"a": ""})}
    assert find_disagreement(joins).endswith(
        "rank 1 had a with no world, and rank 0 with a world of 2"
    )


def test_an_error_of_a_rank_is_shown_even_if_the_tests_agree() -> None:
    joins = {0: join(0, {"a": ""}), 1: join(1, {"a": ""}, "ImportError: no module")}
    assert find_disagreement(joins) == "rank 1: ImportError: no module"


def test_an_error_that_rank_0_has_too_is_left_to_its_own_report() -> None:
    joins = {0: join(0, {"a": ""}, "ImportError"), 1: join(1, {"a": ""}, "ImportError")}
    assert find_disagreement(joins) == ""
