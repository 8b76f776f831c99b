"""The supervisor: a rank has an error that its peers have not received, and waits."""

from __future__ import annotations

from pytest_dcp._harness.protocol.messages import At, Exchange
from pytest_dcp._harness.protocol.places import FAILING_S
from pytest_dcp._harness.world.rank_states import Dump, KillRank
from pytest_dcp._harness.world.timers import STACKS_S
from support.supervisor_replay import PASSED, T0, Ends, Replay, Says, debugged

FAILING = At("failing", "ValueError: 3", 99.5, "the traceback")
AGREED = At("agreed")


def test_a_rank_whose_peers_hang_when_it_waits_with_an_error_names_that() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILING))])
    assert replay.ordered(Dump) == [(T0 + 1 + FAILING_S, rank) for rank in (0, 1)]
    assert replay.failures == [(0, "failed"), (1, "blocked")]
    said = "ValueError: 3 (killed: it waited for its peers to receive that)"
    assert replay.summary(0) == said
    first = replay.supervisor.failures[0]
    assert (first.at_s, first.detail) == (99.5, "the traceback")
    assert replay.summary(1) == "still in call"


def test_peers_that_come_late_to_hear_of_an_error_make_no_failure_of_it() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 1, Says(0, FAILING)),
            (T0 + FAILING_S, Says(0, AGREED)),
            (T0 + 2 * FAILING_S, Says(0, PASSED)),  # it was expected
            (T0 + 2 * FAILING_S, Says(1, PASSED)),
        ]
    )
    assert (replay.failures, replay.ordered(Dump)) == ([], [])


def test_the_time_limit_of_a_test_that_waits_with_an_error_is_not_the_cause() -> None:
    replay = Replay.calling(2, limit_s=5.0)
    wait = [(T0 + 1, Says(0, FAILING)), (T0 + 1, Says(0, Exchange("record(): it ends")))]
    replay.play(wait)
    assert replay.failures == [(0, "failed"), (1, "timeout")]
    assert replay.ordered(KillRank)[0][0] == T0 + 5 + STACKS_S


def test_a_rank_that_dies_while_it_waits_with_an_error_has_reported_it() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILING)), (T0 + 2, Ends(0, -11)), (T0 + 2, Says(1, PASSED))])
    assert replay.failures == [(0, "crashed")]
    assert replay.summary(0).endswith("it had raised ValueError: 3")


def test_the_wait_with_an_error_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILING)), *debugged(1.5, 900, 1)])
    assert replay.ordered(Dump)[0][0] == T0 + 1 + (900 - 1.5) + FAILING_S
