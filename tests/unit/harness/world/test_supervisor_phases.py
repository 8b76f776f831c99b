"""The supervisor: phases that end well."""

from __future__ import annotations

import math

import pytest

from pytest_dcp._harness.protocol.messages import Go, RankOutcome
from pytest_dcp._harness.world.rank_states import Dump, KillRank, Send
from pytest_dcp._harness.world.timers import STACKS_S
from support.supervisor_replay import FAILED, GRACE_S, PASSED, T0, Replay, Says, make_result


def test_a_world_comes_up_when_every_rank_said_so() -> None:
    replay = Replay(3)
    replay.supervisor.boot(T0 + 120.0)
    replay.play(
        [(T0 + 1, Says(0, make_result("boot"))), (T0 + 2, Says(2, make_result("boot")))],
        until=T0 + 9,
    )
    assert not replay.supervisor.settled
    assert replay.supervisor.busy == [1]
    replay.play([(T0 + 10, Says(1, make_result("boot")))])
    assert replay.supervisor.busy == []
    assert replay.supervisor.all_ranks_alive
    assert replay.supervisor.idle == [0, 1, 2]
    assert replay.log == []


def test_a_phase_sends_its_order_to_every_rank_and_settles_when_all_are_done() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], order=Go("call"))
    assert replay.log == [(T0, Send(0, Go("call"))), (T0, Send(1, Go("call")))]
    replay.play([(T0 + 1, Says(1, PASSED)), (T0 + 2, Says(0, PASSED))])
    assert replay.supervisor.results == {0: PASSED, 1: PASSED}
    assert replay.failures == []
    assert replay.supervisor.all_ranks_alive
    assert replay.supervisor.wake_at() == math.inf
    assert len(replay.log) == 2


def test_phases_follow_each_other_and_the_second_forgets_the_first() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILED)), (T0 + 1, Says(1, PASSED))])
    assert replay.failures == [(0, "failed")]
    replay.begin([0, 1], "teardown")
    assert replay.supervisor.failures == []
    assert replay.supervisor.results == {}
    torn = make_result("teardown")
    replay.play([(T0 + 1.5, Says(0, torn)), (T0 + 9, Says(1, torn))])
    # The grace of the first phase's failure would have ended rank 1 at T0 + 2.
    assert replay.failures == []
    assert replay.ordered(KillRank) == []


@pytest.mark.parametrize("outcome", ["exit", "interrupt"])
def test_a_rank_that_stops_the_session_gives_its_peers_the_grace(outcome: RankOutcome) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, make_result(outcome=outcome)))])
    assert replay.failures == [(1, "blocked")]
    assert replay.ordered(KillRank) == [(T0 + 1 + GRACE_S + STACKS_S, 1)]


@pytest.mark.parametrize("outcome", ["skipped", "xfailed"])
def test_an_outcome_that_is_no_failure_starts_no_grace(outcome: RankOutcome) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, make_result(outcome=outcome))), (T0 + 30, Says(1, PASSED))])
    assert replay.failures == []
    assert replay.ordered(Dump) == []
