"""A warm test that leaves its ranks out of step fails, and the next test gets a new world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

COLLECTIVES = "ranks started different numbers of collectives in process group"
GUILTY = {
    "test_collective_of_one_rank": ("call", f"{COLLECTIVES} '0' (rank 0: 1, ranks 1,2: 0)"),
    "test_collective_in_a_subgroup": ("call", f"{COLLECTIVES} '1' (rank 0: 0, rank 1: 1)"),
    "test_collective_at_teardown": (
        "teardown",
        f"{COLLECTIVES} '0' (ranks 0,2: 0, rank 1: 1)",
    ),
    "test_collectives_of_two_kinds": (
        "call",
        "ranks started different collectives in process group '0' (rank 0: broadcast, ranks 1,2: "
        "all_reduce)",
    ),
    "test_message_that_is_not_received": (
        "call",
        "rank 2 received 0 of 1 messages from rank 0 in process group '0'",
    ),
    "test_receive_of_nothing": (
        "call",
        "rank 2 received 1 of 0 messages from its peers in process group '0'",
    ),
    "test_group_of_one_rank": (
        "call",
        "ranks made different numbers of process groups (rank 0: 1, ranks 1,2: 0)",
    ),
}
OPEN = "would be taken up by the next test in this world"


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_out_of_step.py": "out_of_step.py"}).run()


@pytest.mark.parametrize("test", GUILTY)
def test_the_test_that_leaves_something_open_fails(session: SessionResult, test: str) -> None:
    when, said = GUILTY[test]
    report = session.phases(test)[when]
    assert report.category == ("failed" if when == "call" else "error")
    assert report.headline.startswith(said)
    assert OPEN in report.headline


@pytest.mark.parametrize("test", ["test_other_half", "test_in_step", "test_in_step_after"])
def test_the_tests_after_it_pass_in_a_world_of_their_own(session: SessionResult, test: str) -> None:
    assert session.outcomes(test) == {"call": "passed"}


def test_an_expected_failure_may_be_that(session: SessionResult) -> None:
    assert session.outcomes("test_expected_failure") == {"call": "xfailed"}


def test_a_world_whose_ranks_are_in_step_is_kept(session: SessionResult) -> None:
    pids = {note["rank"]: set() for note in session.noted("in step")}
    for note in session.noted("in step"):
        pids[note["rank"]].add(note["pid"])
    assert {rank: len(found) for rank, found in pids.items()} == {0: 1, 1: 1, 2: 1}


def test_an_example_that_leaves_something_open_fails_and_is_made_small(
    session: SessionResult,
) -> None:
    report = session.bad("test_example")
    assert report.headline.startswith(f"{COLLECTIVES} '0' (rank 0: 1, ranks 1,2: 0)")
    assert "x=101," in report.text


def test_examples_in_step_share_a_world(session: SessionResult) -> None:
    assert session.outcomes("test_example_in_step") == {"call": "passed"}
    assert len({note["pid"] for note in session.noted("examples in step")}) == 3
