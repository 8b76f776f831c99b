"""The supervisor: ranks that die, close their socket, print without end, or cannot be killed."""

from __future__ import annotations

import math
import signal

import pytest

from pytest_dcp._harness.protocol.messages import DebugAsk, Exchange
from pytest_dcp._harness.world.rank_states import Dump, KillRank, exit_text
from pytest_dcp._harness.world.timers import CLOSED_S, LOST_S, STACKS_S
from support.supervisor_replay import (
    DYING_S,
    FAILED,
    GRACE_S,
    PASSED,
    T0,
    Closes,
    Ends,
    Floods,
    Replay,
    Says,
)


@pytest.mark.parametrize(
    ("status", "how"), [(-signal.SIGSEGV, "SIGSEGV"), (3, "code 3"), (0, "code 0")]
)
def test_a_rank_that_dies_in_a_phase_is_a_crash_and_its_peers_get_the_grace(
    status: int, how: str
) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Ends(1, status))])
    assert replay.failures == [(1, "crashed"), (0, "blocked")]
    assert how in replay.summary(1)
    assert "call" in replay.summary(1)
    assert replay.log == [
        (T0 + 2 + GRACE_S, Dump(0)),
        (T0 + 2 + GRACE_S + STACKS_S, KillRank(0)),
    ]


def test_a_rank_that_dies_between_phases_fails_the_world_without_a_kill() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, PASSED)), (T0 + 1, Says(1, PASSED))])
    replay.play([(T0 + 2, Ends(1, -signal.SIGKILL))])
    assert replay.failures == [(1, "crashed")]
    assert "SIGKILL" in replay.summary(1)
    assert replay.supervisor.settled
    assert not replay.supervisor.all_ranks_alive
    assert replay.supervisor.idle == [0]
    assert replay.log == []


def test_a_rank_that_answers_and_dies_in_the_same_moment_keeps_its_answer() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, PASSED)), (T0 + 1, Ends(1, 1)), (T0 + 1.5, Says(0, PASSED))])
    assert replay.supervisor.results == {0: PASSED, 1: PASSED}
    assert replay.failures == [(1, "crashed")]


def test_a_closed_socket_is_named_by_the_exit_that_follows() -> None:
    replay = Replay.calling(2)
    exit_ = (T0 + 2 + CLOSED_S / 2, Ends(1, -signal.SIGABRT))
    replay.play([(T0 + 2, Closes(1)), exit_, (T0 + 2.5, Says(0, PASSED))])
    assert replay.failures == [(1, "crashed")]
    assert "SIGABRT" in replay.summary(1)
    assert replay.log == []


def test_a_rank_that_closes_its_socket_and_lives_is_killed() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Closes(1)), (T0 + 2.5, Says(0, PASSED))])
    assert replay.log == [(T0 + 2 + CLOSED_S, KillRank(1))]
    assert replay.failures == [(1, "closed")]


def test_a_second_end_of_the_socket_does_not_prolong_the_wait_for_the_exit() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 2, Closes(0)), (T0 + 2 + CLOSED_S / 2, Closes(0))])
    assert replay.ordered(KillRank) == [(T0 + 2 + CLOSED_S, 0)]


def test_a_rank_whose_socket_closes_between_phases_is_found_in_the_next() -> None:
    replay = Replay.ready(2)
    replay.play([(T0, Closes(1))], until=T0)
    replay.begin([0, 1])
    replay.play([(T0 + 0.125, Says(0, PASSED))])
    assert replay.failures == [(1, "closed")]
    assert replay.ordered(KillRank) == [(T0 + CLOSED_S, 1)]


def test_a_rank_that_prints_too_much_is_killed_at_once_and_named_with_the_size() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Floods(1, 123456)), (T0 + 2.5, Floods(1, 999999))])
    assert replay.ordered(KillRank)[0] == (T0 + 2, 1)
    assert replay.failures == [(1, "flooded"), (0, "blocked")]
    assert "123456" in replay.summary(1)


def test_later_messages_and_acts_of_a_killed_rank_change_nothing() -> None:
    replay = Replay.calling(2)
    late = T0 + 2 + DYING_S / 2
    replay.play(
        [
            (T0 + 2, Floods(1, 10)),
            (late, Says(1, PASSED)),
            (late, Says(1, Exchange("barrier()"))),
            (late, Closes(1)),
            (late, Floods(1, 11)),
            (T0 + 3, Says(1, PASSED)),
            (T0 + 3, Ends(1, 0)),
            (T0 + 2.5, Says(0, PASSED)),
        ]
    )
    assert replay.failures == [(1, "flooded")]
    assert set(replay.supervisor.results) == {0}
    assert replay.log == [(T0 + 2, KillRank(1))]


def test_a_rank_that_cannot_be_killed_ends_as_lost() -> None:
    replay = Replay.calling(2, unkillable=[1])
    replay.play([(T0 + 2, Says(0, FAILED))])
    killed = T0 + 2 + GRACE_S + STACKS_S
    assert replay.ordered(KillRank) == [(killed, 1)]
    assert replay.failures == [(0, "failed"), (1, "blocked"), (1, "lost")]
    assert replay.now == killed + LOST_S
    assert replay.supervisor.settled
    assert replay.supervisor.busy == []


def test_a_lost_rank_that_ends_after_all_changes_nothing() -> None:
    replay = Replay.calling(1, unkillable=[0])
    replay.play([(T0 + 2, Floods(0, 1))])
    before = replay.supervisor.failures.copy()
    replay.play([(replay.now + 100, Ends(0, -signal.SIGKILL))])
    assert replay.supervisor.failures == before
    assert replay.supervisor.settled


def test_an_interrupt_kills_every_rank_that_lives_once() -> None:
    replay = Replay.calling(4)
    history = [(T0 + 1, Says(0, PASSED)), (T0 + 1, Ends(1, 1)), (T0 + 1, Floods(2, 1))]
    replay.play(history, until=T0 + 1)  # type: ignore[arg-type]  # a list of one union
    replay._note(replay.supervisor.interrupt(T0 + 1))
    replay.play([])
    assert replay.ordered(KillRank) == [(T0 + 1, 2), (T0 + 1, 0), (T0 + 1, 3)]
    assert replay.supervisor.settled
    assert replay.supervisor.interrupt(replay.now) == []


def test_an_interrupt_takes_the_terminal_from_the_debugger() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace")))], until=T0 + 5)
    replay._note(replay.supervisor.interrupt(replay.now))
    assert not replay.supervisor.paused
    replay.play([])
    assert replay.supervisor.settled


def test_all_living_ranks_are_lost_at_once_when_their_launcher_is_gone() -> None:
    replay = Replay.calling(5)
    replay.play(
        [
            (T0 + 1, Says(0, PASSED)),
            (T0 + 1, Ends(1, 1)),
            (T0 + 1, Floods(2, 1)),
            (T0 + 1, Closes(3)),
            (T0 + 1, Says(4, DebugAsk("set_trace"))),
        ],
        until=T0 + 1,
    )
    replay.log.clear()
    replay.supervisor.abandon("the zygote was killed by signal 9", T0 + 1)
    assert replay.supervisor.settled
    assert not replay.supervisor.all_ranks_alive
    assert not replay.supervisor.paused
    assert replay.supervisor.idle == replay.supervisor.busy == []
    assert replay.failures[2:] == [(0, "lost"), (2, "lost"), (3, "lost"), (4, "lost")]
    assert "zygote" in replay.summary(4)
    assert replay.supervisor.wake_at() == math.inf
    assert replay.supervisor.tick(T0 + 1000) == []
    replay.play([(T0 + 1001, Ends(4, -signal.SIGKILL)), (T0 + 1001, Says(3, PASSED))])
    assert replay.log == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, ["code 0"]), (137, ["code 137"]), (-9, ["9", "SIGKILL"]), (-250, ["250"])],
)
def test_an_exit_is_reported_by_its_code_or_its_signal(status: int, words: list[str]) -> None:
    text = exit_text(status)
    assert all(word in text for word in words)
    assert ("signal" in text) == (status < 0)
