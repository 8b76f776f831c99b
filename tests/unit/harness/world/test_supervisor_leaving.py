"""The supervisor: ranks that leave at the end, and how their exit went."""

from __future__ import annotations

import signal

import pytest

from pytest_dcp._harness.protocol.messages import Done, Leave
from pytest_dcp._harness.world.rank_states import Dump, KillRank
from pytest_dcp._harness.world.timers import STACKS_S
from support.supervisor_replay import PASSED, T0, Closes, Ends, Replay, Says

EXITED = Done("finish", "passed", T0 + 1)


def test_ranks_that_leave_with_code_0_are_gone_without_a_failure() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    assert replay.sent(1) == [Leave()]
    replay.play(
        [
            *((T0 + 1, event) for event in (Says(0, EXITED), Closes(0), Ends(0, 0))),
            *((T0 + 5, event) for event in (Says(1, EXITED), Closes(1))),
            (T0 + 6, Ends(1, 0)),
        ]
    )
    assert replay.failures == []
    assert replay.supervisor.settled
    assert replay.supervisor.idle == []
    assert replay.ordered(KillRank) == []


@pytest.mark.parametrize(("status", "how"), [(1, "code 1"), (-signal.SIGSEGV, "SIGSEGV")])
def test_a_rank_that_leaves_otherwise_failed_after_its_verdict(status: int, how: str) -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, EXITED)), (T0 + 1, Ends(0, 0)), (T0 + 1, Ends(1, status))])
    assert replay.failures == [(1, "crashed")]
    assert how in replay.summary(1)
    assert "after its verdict" in replay.summary(1)


def test_code_0_of_a_rank_that_did_not_say_that_its_exit_ran_is_a_failure() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, EXITED)), (T0 + 1, Ends(0, 0)), (T0 + 1, Ends(1, 0))])
    assert replay.failures == [(1, "crashed")]
    assert replay.summary(1) == "exited with code 0 before its exit had finished"


def test_the_verdict_of_an_earlier_phase_does_not_say_that_the_exit_ran() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 1, Says(0, PASSED))])
    replay.begin([0], "finish", order=Leave())
    replay.play([(T0 + 2, Ends(0, 0))])
    assert replay.failures == [(0, "crashed")]


def test_a_rank_that_does_not_leave_in_time_is_killed() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", limit_s=20.0, order=Leave())
    replay.play([(T0 + 1, Says(0, EXITED)), (T0 + 1, Ends(0, 0)), (T0 + 1, Closes(1))])
    assert replay.log[2:] == [(T0 + 20, Dump(1)), (T0 + 20 + STACKS_S, KillRank(1))]
    assert replay.failures == [(1, "timeout")]


def test_a_rank_that_talks_while_it_leaves_is_killed() -> None:
    replay = Replay.ready(1)
    replay.begin([0], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 1, 0)]


def test_a_rank_that_leaves_says_once_how_its_exit_went() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    last_word = Done("finish", "passed", T0 + 1, threads=("sleeper",))
    said = [(T0 + 1, Says(0, last_word)), (T0 + 1, Says(1, EXITED))]
    replay.play([*said, (T0 + 2, Ends(0, 0)), (T0 + 2, Ends(1, 0))])
    assert replay.supervisor.results == {0: last_word, 1: EXITED}
    assert replay.supervisor.settled
    assert replay.failures == []


def test_a_rank_that_says_how_its_exit_went_still_has_to_exit_with_0() -> None:
    replay = Replay.ready(1)
    replay.begin([0], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, Done("finish", "passed", T0 + 1))), (T0 + 2, Ends(0, 3))])
    assert replay.failures == [(0, "crashed")]
    assert "exited with code 3 after its verdict" in replay.summary(0)


def test_a_rank_that_says_it_twice_is_killed() -> None:
    replay = Replay.ready(1)
    replay.begin([0], "finish", order=Leave())
    last_word = Done("finish", "passed", T0 + 1)
    replay.play([(T0 + 1, Says(0, last_word)), (T0 + 2, Says(0, last_word))])
    assert replay.ordered(KillRank) == [(T0 + 2, 0)]
