"""The supervisor: one rank has the terminal, and every clock stands still."""

from __future__ import annotations

import math

from pytest_dcp._harness.protocol.messages import DebugAnswer, DebugAsk, DebugDone, Exchange, Met
from pytest_dcp._harness.world.rank_states import Dump, KillRank, Send
from pytest_dcp._harness.world.terminal import Terminal
from pytest_dcp._harness.world.timers import CLOSED_S, STACKS_S
from support.supervisor_replay import (
    FAILED,
    GRACE_S,
    PASSED,
    T0,
    Closes,
    Ends,
    Floods,
    Replay,
    Says,
    debugged,
)


def test_the_first_that_asks_gets_the_terminal_and_its_group() -> None:
    replay = Replay.calling(2, terminal=Terminal(group=4321))
    replay.play([(T0 + 1, Says(1, DebugAsk("set_trace")))], until=T0 + 1)
    assert replay.log == [(T0 + 1, Send(1, DebugAnswer(granted=True, group=4321)))]
    assert replay.supervisor.paused
    assert replay.supervisor.wake_at() == math.inf


def test_a_second_asker_goes_on_without_and_without_an_error() -> None:
    replay = Replay.calling(2)
    asks = [(T0 + 1 + rank, Says(rank, DebugAsk("post_mortem"))) for rank in (0, 1)]
    replay.play(asks, until=T0 + 2)
    assert replay.sent(1) == [DebugAnswer(granted=False)]
    assert 1 in replay.supervisor.busy
    # Nor later, when the terminal is free: the user talks to one rank.
    replay.play(
        [(T0 + 3, Says(0, DebugDone())), (T0 + 4, Says(1, DebugAsk("again")))], until=T0 + 4
    )
    assert replay.sent(1) == [DebugAnswer(granted=False)] * 2


def test_the_rank_that_had_the_terminal_gets_it_again() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 1, Says(1, DebugAsk("set_trace"))),
            (T0 + 2, Says(1, DebugDone())),
            (T0 + 3, Says(1, DebugAsk("set_trace"))),
        ],
        until=T0 + 3,
    )
    assert replay.sent(1) == [DebugAnswer(granted=True)] * 2
    assert replay.supervisor.paused


def test_a_pinned_rank_gets_the_terminal_although_another_asked_first() -> None:
    replay = Replay.calling(2, terminal=Terminal(rank=1))
    asks = [(T0 + 1 + rank, Says(rank, DebugAsk("set_trace"))) for rank in (0, 1)]
    replay.play(asks, until=T0 + 2)
    assert replay.sent(0) == [DebugAnswer(granted=False)]
    assert replay.sent(1) == [DebugAnswer(granted=True)]


def test_without_a_terminal_every_asker_gets_the_reason() -> None:
    replay = Replay.calling(2, terminal=Terminal(missing="pytest -n has no terminal"))
    asks = [(T0 + 1, Says(rank, DebugAsk("set_trace"))) for rank in (0, 1)]
    replay.play(asks, until=T0 + 1)
    for rank in (0, 1):
        assert replay.sent(rank) == [DebugAnswer(granted=False, error="pytest -n has no terminal")]
    assert not replay.supervisor.paused


def test_the_time_limit_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([*debugged(4, 1004)])
    assert replay.ordered(Dump) == [(T0 + 1010, 0), (T0 + 1010, 1)]
    assert replay.ordered(KillRank)[0] == (T0 + 1010 + STACKS_S, 0)


def test_the_grace_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(3, limit_s=math.inf)
    replay.play([(T0 + 1, Says(2, FAILED)), *debugged(1.25, 1001.25)])
    # A quarter of the grace was over before, so three quarters are left after.
    assert replay.ordered(Dump) == [(T0 + 1001.25 + 0.75, 0), (T0 + 1001.25 + 0.75, 1)]


def test_a_failure_during_the_pause_leaves_the_peers_the_grace_and_no_more() -> None:
    replay = Replay.calling(3, limit_s=math.inf)
    replay.play([*debugged(0, 3600), (T0 + 3000, Says(2, FAILED))])
    assert replay.ordered(Dump) == [(T0 + 3600 + GRACE_S, 0), (T0 + 3600 + GRACE_S, 1)]


def test_the_time_for_stacks_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([*debugged(10 + STACKS_S / 2, 100)])
    (at, _), *_ = replay.ordered(KillRank)
    assert T0 + 100 < at <= T0 + 100 + STACKS_S


def test_who_steps_over_an_exchange_in_the_debugger_meets_its_peers_and_keeps_the_terminal() -> (
    None
):
    replay = Replay.calling(2, limit_s=10.0)
    barrier = Exchange("barrier()")
    history = [(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 100, Says(0, barrier))]
    replay.play([*history, (T0 + 200, Says(1, barrier))], until=T0 + 300)
    assert replay.sent(0)[1:] == replay.sent(1) == [Met(sizes=(0, 0))]
    assert replay.supervisor.paused
    replay.play([(T0 + 400, Says(0, DebugDone()))])
    # One second of ten was used before the debugger: nine are left.
    assert replay.ordered(Dump) == [(T0 + 409, 0), (T0 + 409, 1)]


def test_who_waits_in_the_debugger_for_a_rank_that_will_not_come_keeps_the_terminal() -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 2, Says(0, Exchange("barrier()")))]
    replay.play([*history, (T0 + 3, Says(1, PASSED))], until=T0 + 3)
    granted, met = replay.sent(0)
    assert granted == DebugAnswer(granted=True)
    assert isinstance(met, Met)
    assert "cannot complete" in met.error
    assert replay.supervisor.paused


def test_a_rank_that_dies_in_the_debugger_starts_the_clocks_again() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 500, Ends(0, 1))])
    assert replay.failures == [(0, "crashed"), (1, "blocked")]
    assert replay.ordered(Dump) == [(T0 + 500 + GRACE_S, 1)]


def test_a_rank_that_floods_in_the_debugger_starts_the_clocks_again() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 500, Floods(0, 1))])
    assert replay.failures == [(0, "flooded"), (1, "blocked")]


def test_a_rank_that_closes_its_socket_in_the_debugger_and_lives_is_killed() -> None:
    # It can no longer say that it is done, so nothing would ever start the clocks again.
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 9, Closes(0))])
    assert replay.ordered(KillRank)[0] == (T0 + 9 + CLOSED_S, 0)
    assert replay.failures[0] == (0, "closed")
