"""The supervisor: deaths and stops that the test asked for."""

from __future__ import annotations

import math
import signal

import pytest

from pytest_dcp._harness.protocol.messages import Announce, Exchange, FaultAnswer, FaultAsk, Met
from pytest_dcp._harness.world.rank_states import Continue, Dump, KillRank, Send, exit_text
from pytest_dcp._harness.world.requested_deaths import OWED_S
from support.supervisor_replay import (
    DYING_S,
    FAILED,
    PASSED,
    T0,
    Ends,
    Floods,
    Halts,
    Replay,
    Says,
    Strikes,
    debugged,
    error_to,
    make_result,
)

KILLED = -signal.SIGKILL


@pytest.mark.parametrize("status", [KILLED, 0, 1])
def test_a_death_that_was_announced_is_no_failure_and_its_peers_go_on(status: int) -> None:
    replay = Replay.calling(3)
    replay.play(
        [
            (T0 + 1, Says(1, Announce("NoSpace at write_data"))),
            (T0 + 1, Ends(1, status)),
            (T0 + 30, Says(0, PASSED)),
            (T0 + 31, Says(2, PASSED)),
        ]
    )
    assert replay.failures == []
    assert set(replay.supervisor.results) == {0, 2}
    assert replay.log == []
    assert replay.lost[1] == f"{exit_text(status)} as asked: NoSpace at write_data"
    assert replay.supervisor.idle == [0, 2]
    assert not replay.supervisor.all_ranks_alive


def test_a_rank_that_announces_its_death_and_lives_is_a_failure_and_is_killed() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, Announce("at save"))), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "spared")]
    assert "at save" in replay.summary(1)
    assert replay.ordered(KillRank) == [(T0 + 1 + OWED_S, 1)]
    assert replay.lost == {}


def test_a_rank_that_announces_its_death_and_then_answers_must_still_die() -> None:
    # A worker thread announces; before it acts, the main thread comes to the end of the phase.
    replay = Replay.calling(2)
    said = [(T0 + 1, Says(1, Announce("at save"))), *[(T0 + 1, Says(r, PASSED)) for r in (0, 1)]]
    replay.play(said, until=T0 + 2)
    assert not replay.supervisor.settled
    replay.play([(T0 + 2, Ends(1, KILLED))])
    assert replay.failures == []
    assert set(replay.lost) == {1}
    replay = Replay.calling(2)
    replay.play(said)
    assert replay.failures == [(1, "spared")]


def test_a_failure_before_the_announced_death_stays_one() -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Says(1, FAILED)), (T0 + 1, Says(1, Announce("late")))]
    replay.play([*history, (T0 + 1, Ends(1, KILLED)), (T0 + 1.5, Says(0, PASSED))])
    assert replay.failures == [(1, "failed")]


def test_the_death_of_one_rank_that_was_asked_for_excuses_no_other() -> None:
    replay = Replay.calling(3)
    history = [(T0 + 1, Says(1, Announce("at save"))), (T0 + 1, Ends(1, KILLED))]
    replay.play([*history, (T0 + 2, Ends(2, KILLED))])
    assert replay.failures == [(2, "crashed"), (0, "blocked")]
    assert set(replay.lost) == {1}


def test_a_rank_is_killed_at_another_s_word_and_the_asker_hears_when_it_is_gone() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Says(0, FaultAsk("kill", 2)))], until=T0 + 2)
    assert replay.log == [
        (T0 + 1, KillRank(2)),
        (T0 + 1 + DYING_S, Send(0, FaultAnswer(survivors=(0, 1)))),
    ]
    replay.play([(T0 + 3, Says(rank, PASSED)) for rank in (0, 1)])
    assert replay.failures == []
    assert "SIGKILL" in replay.lost[2]
    assert "world.kill(2) in rank 0" in replay.lost[2]


def test_a_rank_that_has_itself_killed_hears_nothing() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, FaultAsk("kill", 1))), (T0 + 2, Says(0, PASSED))])
    assert replay.log == [(T0 + 1, KillRank(1))]
    assert replay.failures == []
    assert set(replay.lost) == {1}


def test_to_kill_a_rank_twice_is_to_kill_it_once_and_both_askers_hear() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Says(rank, FaultAsk("kill", 2))) for rank in (0, 1)], until=T0 + 2)
    replay.play([(T0 + 3, Says(0, FaultAsk("kill", 2)))], until=T0 + 3)
    assert replay.ordered(KillRank) == [(T0 + 1, 2)]
    assert [at for at, _ in replay.ordered(Send)] == [T0 + 1 + DYING_S] * 2 + [T0 + 3]


def test_who_is_killed_as_asked_and_does_not_go_away_is_lost_as_a_failure() -> None:
    replay = Replay.calling(2, unkillable=[1])
    replay.play([(T0 + 1, Strikes("kill", 1)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "lost")]
    assert replay.lost == {}
    assert replay.supervisor.settled
    replay.play([(replay.now + 100, Ends(1, KILLED))])
    assert replay.lost == {}


def test_an_asker_that_is_killed_itself_is_not_answered() -> None:
    replay = Replay.calling(3, unkillable=[0, 1])
    asks = [(T0 + 1, Says(0, FaultAsk("kill", 1))), (T0 + 2, Floods(0, 1))]
    replay.play([*asks, (T0 + 2.5, Ends(1, KILLED))], until=T0 + 2.75)
    assert replay.sent(0) == []


def test_a_paused_rank_delays_no_peer_and_is_killed_at_the_end_of_the_phase() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Says(0, FaultAsk("pause", 2)))], until=T0 + 2)
    assert replay.sent(0) == [FaultAnswer(survivors=(0, 1))]
    replay.play([(T0 + 30, Says(rank, PASSED)) for rank in (0, 1)])
    assert replay.ordered(KillRank) == []
    replay.dismiss()
    assert replay.ordered(KillRank) == [(T0 + 30, 2)]
    assert replay.failures == []
    assert "stopped as asked: world.pause(2) in rank 0" in replay.lost[2]


def test_a_paused_rank_that_is_resumed_owes_its_answer_again() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FaultAsk("pause", 1)))], until=T0 + 2)
    replay.play([(T0 + 2, Says(0, FaultAsk("resume", 1)))], until=T0 + 3)
    assert replay.sent(0) == [FaultAnswer(survivors=(0,)), FaultAnswer(survivors=(0, 1))]
    replay.play([(T0 + 3, Says(0, PASSED))], until=T0 + 20)
    assert not replay.supervisor.settled
    replay.play([(T0 + 20, Says(1, PASSED))])
    assert replay.failures == []
    assert replay.lost == {}
    assert replay.supervisor.all_ranks_alive


def test_a_rank_that_is_about_to_stop_is_resumed_when_it_has_stopped() -> None:
    replay = Replay.calling(2)
    asks = [(T0 + 1, Says(1, Announce("at save"))), (T0 + 2, Says(0, FaultAsk("resume", 1)))]
    replay.play([*asks, (T0 + 3, Halts(1, True))], until=T0 + 4)
    assert replay.ordered(Continue) == [(T0 + 3, 1)]
    assert replay.ordered(Send) == [(T0 + 3 + DYING_S, 0)]
    assert replay.supervisor.deaths.wishes == {}


def test_a_rank_that_stopped_and_went_on_before_anybody_looked_owes_nothing_more() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, Announce("at save"))), (T0 + 2, Halts(1, False))], until=T0 + 3)
    assert replay.supervisor.deaths.wishes == {}
    replay.play([(T0 + 20, Says(rank, PASSED)) for rank in (0, 1)])
    assert replay.failures == []


def test_a_rank_that_should_be_paused_and_is_not_is_a_failure() -> None:
    replay = Replay.calling(2, unkillable=[1])
    replay.play([(T0 + 1, Strikes("pause", 1)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures[0] == (1, "spared")


def test_a_rank_that_should_be_paused_and_dies_first_has_crashed() -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Strikes("pause", 1)), (T0 + 1, Ends(1, -signal.SIGSEGV))]
    replay.play([*history, (T0 + 1.5, Says(0, PASSED))])
    assert replay.failures == [(1, "crashed")]
    assert replay.lost == {}


def test_a_rank_that_stops_unasked_is_waited_for_until_the_limit() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Halts(1, True)), (T0 + 1, Says(0, PASSED))])
    assert replay.failures == [(1, "timeout")]


def test_at_the_limit_a_paused_rank_is_killed_as_asked_and_running_ranks_are_named() -> None:
    replay = Replay.calling(3, limit_s=10.0)
    replay.play([(T0 + 1, Strikes("pause", 2)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "timeout")]
    assert set(replay.lost) == {2}
    assert replay.ordered(Dump) == [(T0 + 10, 1)]


def test_a_peer_s_failure_does_not_make_a_paused_rank_one() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Strikes("pause", 2)), (T0 + 2, Says(0, FAILED))])
    assert replay.failures == [(0, "failed"), (1, "blocked")]
    assert set(replay.lost) == {2}


def test_a_fault_on_a_dead_rank_is_an_error() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Strikes("kill", 1))], until=T0 + 2)
    for act in ("pause", "resume"):
        replay.play([(T0 + 3, Says(0, FaultAsk(act, 1)))], until=T0 + 3)
    errors = [m.error for m in replay.sent(0) if isinstance(m, FaultAnswer)]
    assert errors == [f"rank 1 is gone: there is nothing to {act}" for act in ("pause", "resume")]


def test_the_survivors_of_an_asked_for_death_meet_without_the_dead() -> None:
    replay = Replay.calling(3)
    meet = [(T0 + 1, Says(rank, Exchange("gather()", b"%d" % rank))) for rank in (0, 2)]
    replay.play([*meet, (T0 + 2, Strikes("kill", 1))], until=T0 + 3)
    (met,) = replay.sent(0)
    assert isinstance(met, Met)
    assert met.values() == [b"0", None, b"2"]
    replay.play([(T0 + 4, Says(rank, Exchange("barrier()"))) for rank in (0, 2)], until=T0 + 4)
    assert replay.sent(0)[1:] == [Met(sizes=(0, -1, 0))]


def test_ranks_meet_without_one_that_is_paused_and_with_it_when_it_was_there_first() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Strikes("pause", 1))], until=T0 + 1.5)
    meet = [(T0 + 2, Says(rank, Exchange("gather()", b"%d" % rank))) for rank in (0, 2)]
    replay.play(meet, until=T0 + 3)
    (met,) = replay.sent(0)
    assert isinstance(met, Met)
    assert met.values() == [b"0", None, b"2"]
    replay = Replay.calling(2)
    waits = [(T0 + 1, Says(1, Exchange("gather()", b"1"))), (T0 + 2, Strikes("pause", 1))]
    replay.play([*waits, (T0 + 3, Says(0, Exchange("gather()", b"0")))], until=T0 + 3)
    assert replay.sent(1) == [Met(sizes=(1, 1), payload=b"01")]


def test_who_dies_unasked_is_still_waited_for_in_vain() -> None:
    replay = Replay.calling(3)
    meet = [(T0 + 1, Says(0, Exchange("barrier()"))), (T0 + 2, Strikes("kill", 1))]
    replay.play([*meet, (T0 + 3, Ends(2, KILLED))], until=T0 + 3)
    assert "rank 2 (was killed by signal 9" in error_to(replay, 0)
    assert "rank 1 (" not in error_to(replay, 0)


def test_a_lost_rank_stays_lost_in_the_phases_that_follow() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Strikes("kill", 1)), (T0 + 2, Says(0, PASSED))])
    replay.begin(replay.supervisor.idle, "teardown")
    replay.play(
        [(T0 + 3, Says(0, Exchange("barrier()"))), (T0 + 4, Says(0, make_result("teardown")))]
    )
    assert replay.failures == []
    assert set(replay.supervisor.results) == {0}
    assert set(replay.lost) == {1}


def test_the_time_to_die_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2, limit_s=math.inf)
    history = [(T0 + 1, Says(1, Announce("at save"))), *debugged(2, 1002)]
    replay.play([*history, (T0 + 1003, Says(0, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 1001 + OWED_S, 1)]
