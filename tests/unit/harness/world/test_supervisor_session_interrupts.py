"""The supervisor: a phase that an interrupt of the session cuts off."""

from __future__ import annotations

import pytest

from pytest_dcp._harness.protocol.messages import At, DebugAsk, Exchange, Leave, Phase
from pytest_dcp._harness.world.interrupt_clock import AGAIN_S, END_S, HEED_S
from pytest_dcp._harness.world.rank_states import Dump, Interrupt, KillRank, Send
from pytest_dcp._harness.world.timers import STACKS_S
from support.supervisor_replay import (
    FAILED,
    GRACE_S,
    RAISED,
    T0,
    Interrupted,
    Replay,
    Says,
    SeenAtWork,
    make_result,
)

HEEDS = At("interrupted")


def test_ranks_at_work_are_interrupted_until_they_say_that_they_heard() -> None:
    replay = Replay.calling(2)
    heard = [(T0 + 5.3, Says(0, HEEDS)), (T0 + 5.4, Says(0, RAISED)), (T0 + 5.6, Says(1, RAISED))]
    replay.play([(T0 + 5, Interrupted()), *heard])
    sent = replay.ordered(Interrupt)
    assert sent[:2] == [(T0 + 5, 0), (T0 + 5, 1)]
    assert [at for at, rank in sent if rank == 1] == [T0 + 5 + n * AGAIN_S for n in range(3)]
    assert (replay.failures, replay.ordered(KillRank)) == ([], [])
    assert replay.supervisor.all_ranks_alive


def test_a_rank_that_hangs_when_it_is_interrupted_is_killed_and_its_peers_get_time() -> None:
    replay = Replay.calling(2)
    ends = T0 + 5 + HEED_S + 3
    replay.play([(T0 + 5, Interrupted()), (T0 + 5.1, Says(0, HEEDS)), (ends, Says(0, RAISED))])
    assert replay.ordered(Dump) == [(T0 + 5 + HEED_S, 1)]
    assert replay.ordered(KillRank) == [(T0 + 5 + HEED_S + STACKS_S, 1)]
    assert replay.failures == [(1, "blocked")]
    assert replay.summary(1) == "still in call 1.7 s after it was interrupted"
    assert replay.supervisor.idle == [0]


def test_a_rank_that_heard_an_interrupt_is_not_waited_for_without_end() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 5, Interrupted()), *((T0 + 5, Says(rank, HEEDS)) for rank in (0, 1))])
    assert replay.ordered(KillRank) == [(T0 + 5 + END_S + STACKS_S, rank) for rank in (0, 1)]


def test_a_rank_at_work_has_longer_to_hear_an_interrupt() -> None:
    replay = Replay.calling(1)
    seen = T0 + 5 + HEED_S - 0.5
    replay.play([(T0 + 5, Interrupted()), (seen, SeenAtWork(0))])
    assert replay.ordered(KillRank) == [(seen + HEED_S + STACKS_S, 0)]
    replay = Replay.calling(1)
    always = [(T0 + 5 + n, SeenAtWork(0)) for n in range(30)]
    replay.play([(T0 + 5, Interrupted()), *always], until=T0 + 60)
    assert replay.ordered(KillRank) == [(T0 + 5 + END_S + STACKS_S, 0)]


@pytest.mark.parametrize("phase", ["teardown", "finish"])
def test_ranks_that_tear_down_are_not_interrupted_but_have_a_limit(phase: Phase) -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], phase, order=Leave() if phase == "finish" else None)
    replay.play([(T0 + 5, Interrupted()), (T0 + 8, Says(0, make_result(phase)))], until=T0 + 60)
    assert replay.ordered(Interrupt) == []
    assert (T0 + 5 + END_S + STACKS_S, 1) in replay.ordered(KillRank)


def test_a_rank_that_is_interrupted_at_an_exchange_gives_its_verdict() -> None:
    replay = Replay.calling(2)
    wait = [(T0 + 1, Says(rank, Exchange("barrier()"))) for rank in (0,)]
    heard = [(T0 + 5, Says(0, HEEDS)), (T0 + 5, Says(0, RAISED)), (T0 + 5, Says(1, RAISED))]
    replay.play([*wait, (T0 + 5, Interrupted()), *heard])
    assert replay.failures == []
    assert replay.supervisor.idle == [0, 1]
    assert replay.ordered(Send) == []


def test_a_failure_before_an_interrupt_stays_one_and_the_peers_get_their_time() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 4.5, Says(0, FAILED)),
            (T0 + 5, Interrupted()),
            (T0 + 5.1, Says(1, HEEDS)),
            (T0 + 5 + GRACE_S + 2, Says(1, RAISED)),
        ]
    )
    assert replay.failures == [(0, "failed")]
    assert replay.ordered(KillRank) == []


def test_a_rank_in_a_debugger_is_killed_when_the_session_is_interrupted() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace")))], until=T0 + 2)
    replay.play([(T0 + 5, Interrupted()), (T0 + 5.5, Says(1, RAISED))])
    assert replay.ordered(KillRank) == [(T0 + 5, 0)]
    assert replay.summary(0) == "stopped in call, in a debugger"


def test_the_phase_after_one_that_was_cut_off_runs_as_usual() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 5, Interrupted()), (T0 + 5.5, Says(0, RAISED))])
    replay.begin([0], "teardown", limit_s=30.0)
    replay.play([(replay.now + 20, Says(0, make_result("teardown")))])
    assert replay.failures == []
    assert replay.ordered(KillRank) == []
