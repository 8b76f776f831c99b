"""The supervisor: messages out of turn are refused, and the rank that sent them is killed."""

from __future__ import annotations

from typing import get_args

import pytest

from pytest_dcp._harness.protocol.messages import (
    At,
    DebugAsk,
    DebugDone,
    Exchange,
    FaultAct,
    FaultAsk,
    Phase,
    RankOutcome,
    SubReport,
    Up,
)
from pytest_dcp._harness.world.rank_states import KillRank
from support.supervisor_replay import PASSED, RAISED, T0, Replay, Says, make_result

OUT_OF_TURN: dict[str, tuple[list[Up], Up]] = {
    "an answer while idle": ([PASSED], PASSED),
    "an exchange while idle": ([PASSED], Exchange("barrier()")),
    "a debugger while idle": ([PASSED], DebugAsk("set_trace")),
    "an answer at an exchange": ([Exchange("barrier()")], PASSED),
    "a second exchange": ([Exchange("barrier()")], Exchange("barrier()")),
    "an interrupted answer while idle": ([PASSED], RAISED),
    "a place at an exchange": ([Exchange("barrier()")], At("ready")),
    "a debugger at an exchange": ([Exchange("barrier()")], DebugAsk("set_trace")),
    "a terminal given back that it never had": ([], DebugDone()),
    "an answer in the debugger": ([DebugAsk("set_trace")], PASSED),
    "the terminal back, at an exchange": (
        [DebugAsk("set_trace"), Exchange("barrier()")],
        DebugDone(),
    ),
    "a second debugger": ([DebugAsk("set_trace")], DebugAsk("set_trace")),
    "a message that is not the supervisor's": ([], SubReport({})),
    "preparing what the call needs": ([], At("preparing", "collecting the test")),
}


@pytest.mark.parametrize(("before", "message"), OUT_OF_TURN.values(), ids=OUT_OF_TURN)
def test_a_rank_that_speaks_out_of_turn_is_killed_and_its_message_is_named(
    before: list[Up], message: Up
) -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Says(1, one)) for one in before]
    replay.play([*history, (T0 + 2, Says(1, message)), (T0 + 2.5, Says(0, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 2, 1)]
    assert replay.failures == [(1, "closed")]
    assert type(message).__name__ in replay.summary(1)
    assert not replay.supervisor.paused


@pytest.mark.parametrize("phase", ["setup", "teardown", "finish"])
@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_an_answer_to_another_order_is_no_answer(phase: Phase, outcome: RankOutcome) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, make_result(phase, outcome))), (T0 + 1, Says(0, PASSED))])
    assert replay.failures == [(1, "closed")]
    assert 1 not in replay.supervisor.results
    assert replay.summary(1).startswith(f"ended {phase} while in call: ")


@pytest.mark.parametrize("act", get_args(FaultAct))
@pytest.mark.parametrize("rank", [-1, 2, 10**30])
def test_a_fault_for_a_rank_that_the_world_does_not_have_is_refused(
    act: FaultAct, rank: int
) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, FaultAsk(act, rank))), (T0 + 1, Says(0, PASSED))])
    assert replay.failures == [(1, "closed")]
    assert replay.summary(1) == f"asked to {act} rank {rank} of a world of 2"
