"""The supervisor: exchanges: all ranks meet, or all that wait hear why they cannot."""

from __future__ import annotations

import signal

import pytest

from pytest_dcp._harness.protocol.messages import Exchange, Met
from pytest_dcp._harness.world.rank_states import KillRank, Send
from pytest_dcp._harness.world.timers import EXITING_S
from support.supervisor_replay import (
    FAILED,
    PASSED,
    T0,
    Closes,
    Ends,
    Event,
    Floods,
    Replay,
    Says,
    error_to,
    make_result,
)


def test_when_all_ranks_meet_each_gets_all_payloads_in_rank_order() -> None:
    replay = Replay.calling(3)
    replay.play(
        [
            (T0 + 1, Says(2, Exchange("gather()", b"two"))),
            (T0 + 2, Says(0, Exchange("gather()", b""))),
            (T0 + 3, Says(1, Exchange("gather()", b"1"))),
        ],
        until=T0 + 4,
    )
    assert [at for at, _ in replay.log] == [T0 + 3] * 3
    for rank in range(3):
        (met,) = replay.sent(rank)
        assert isinstance(met, Met)
        assert met.error == ""
        assert met.values() == [b"", b"1", b"two"]
    assert sorted(replay.supervisor.busy) == [0, 1, 2]


def test_ranks_can_meet_again_and_again() -> None:
    replay = Replay.calling(2)
    history = []
    for turn in range(3):
        history += [(T0 + turn, Says(rank, Exchange("gather()", b"%d" % turn))) for rank in (0, 1)]
    replay.play(history, until=T0 + 3)
    assert [met.values() for met in replay.sent(1) if isinstance(met, Met)] == [
        [b"0", b"0"],
        [b"1", b"1"],
        [b"2", b"2"],
    ]


def test_a_world_of_one_meets_itself_at_once() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 1, Says(0, Exchange("gather()", b"x")))], until=T0 + 1)
    assert replay.log == [(T0 + 1, Send(0, Met(sizes=(1,), payload=b"x")))]


def test_ranks_that_ask_for_different_things_all_get_the_error() -> None:
    replay = Replay.calling(2)
    replay.play(
        [(T0 + 1, Says(0, Exchange("barrier()"))), (T0 + 2, Says(1, Exchange("gather()", b"x")))],
        until=T0 + 2,
    )
    assert replay.ordered(Send) == [(T0 + 2, 0), (T0 + 2, 1)]
    for rank in (0, 1):
        error = error_to(replay, rank)
        assert "different things" in error
        assert "rank 0: barrier()" in error
        assert "rank 1: gather()" in error


def test_who_comes_after_a_mismatch_waits_for_the_next_meeting() -> None:
    replay = Replay.calling(3)
    replay.play(
        [
            (T0 + 1, Says(0, Exchange("barrier()"))),
            (T0 + 2, Says(1, Exchange("gather()"))),
            (T0 + 3, Says(2, Exchange("barrier()"))),
        ],
        until=T0 + 4,
    )
    assert replay.sent(2) == []
    again = [(T0 + 5, Says(rank, Exchange("barrier()"))) for rank in (0, 1)]
    replay.play(again, until=T0 + 5)
    assert replay.sent(2) == [Met(sizes=(0, 0, 0))]


ABSENCES: dict[str, tuple[Event, str]] = {
    "passed": (Says(1, PASSED), "call"),
    "skipped": (Says(1, make_result(outcome="skipped")), "call"),
    "failed": (Says(1, FAILED), "ValueError: 3"),
    "died": (Ends(1, -signal.SIGSEGV), "SIGSEGV"),
    "was killed": (Floods(1, 77), "77 bytes"),
}


@pytest.mark.parametrize(("event", "why"), ABSENCES.values(), ids=ABSENCES)
@pytest.mark.parametrize("first", ["the wait", "the absence"])
def test_a_wait_for_a_dead_rank_fails_at_once_and_says_why(
    event: Event, why: str, first: str
) -> None:
    wait = Says(0, Exchange("barrier()"))
    both: list[Event] = [wait, event] if first == "the wait" else [event, wait]
    replay = Replay.calling(2)
    replay.play([(T0 + 1 + i / 4, one) for i, one in enumerate(both)], until=T0 + 1.25)
    error = error_to(replay, 0)
    assert replay.ordered(Send) == [(T0 + 1.25, 0)]
    assert "cannot complete" in error
    assert "rank 1" in error
    assert "barrier()" in error
    assert why in error
    assert 0 in replay.supervisor.busy


def test_a_rank_that_the_kernel_ends_may_take_its_time_and_has_exited() -> None:
    replay = Replay.calling(2)
    late = T0 + 1 + EXITING_S - 1
    replay.play(
        [(T0 + 1, Closes(0)), (T0 + 1.125, Closes(0, exiting=True)), (late, Ends(0, 0))], until=late
    )
    assert replay.failures == [(0, "crashed")]
    assert replay.summary(0) == "exited with code 0 in call, without a verdict"


def test_a_rank_that_the_kernel_does_not_get_to_end_is_killed() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Closes(0, exiting=True)), (T0 + 2, Says(1, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 1 + EXITING_S, 0)]


def test_a_socket_that_closed_does_not_yet_end_a_meeting_but_the_exit_does() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, Exchange("barrier()"))), (T0 + 1, Closes(1))], until=T0 + 1.125)
    assert replay.log == []
    replay.play([(T0 + 1.1875, Ends(1, 1))], until=T0 + 1.1875)
    assert "cannot complete" in error_to(replay, 0)


def test_a_rank_that_dies_at_an_exchange_frees_the_others() -> None:
    replay = Replay.calling(3)
    met = [(T0 + 1, Says(rank, Exchange("barrier()"))) for rank in (0, 1)]
    replay.play([*met, (T0 + 2, Ends(1, -signal.SIGKILL))], until=T0 + 2)
    assert replay.ordered(Send) == [(T0 + 2, 0)]
    assert "SIGKILL" in error_to(replay, 0)


def test_the_survivors_of_a_failed_phase_can_not_meet_the_dead() -> None:
    # As in a wind-down: a teardown on the ranks that are left.
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Ends(1, 1)), (T0 + 1.5, Says(0, PASSED))])
    replay.begin([0], "teardown")
    replay.log.clear()
    replay.play([(replay.now, Says(0, Exchange("barrier()")))], until=replay.now)
    assert "cannot complete" in error_to(replay, 0)
