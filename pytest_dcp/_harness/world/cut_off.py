"""Ends a phase that an interrupt of this process has cut off: the ranks end it, in bounded time.

Enters: a world in the middle of a phase. Leaves: every rank has answered, died or been killed, and
the phase has an outcome without the KeyboardInterrupts that this process itself has sent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_dcp._harness.protocol.messages import Done, Phase
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp._harness.world.rank_loop import RankLoop
from pytest_dcp._harness.world.supervisor import Supervisor
from pytest_dcp.errors import LostRank, RankFailure

WORK_S = 0.005
"""Processor time that counts as work: a hanging thread uses some 0.05 ms for each signal."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """How a phase ended that an interrupt of this process has cut off."""

    phase: Phase
    outcome: Outcome


def end_phase(loop: RankLoop, supervisor: Supervisor) -> None:
    """Have the ranks end their phase; returns when each has, or is gone."""
    with loop.interrupts.held():
        loop.act(supervisor.cut_off(time.monotonic()))
    seen_s: dict[int, float] = {}
    while not supervisor.settled:
        _look_for_work(loop, supervisor, seen_s)
        loop.step()
    loop.run_until_settled()


def _look_for_work(loop: RankLoop, supervisor: Supervisor, seen_s: dict[int, float]) -> None:
    """Report to the supervisor which busy ranks' main threads have worked since the last look.

    `seen_s` is the processor time that each had used then. Not their states: a thread that
    hangs wakes up for each signal.
    """
    for rank in supervisor.busy:
        used_s = loop.main_thread_cpu_s(rank)
        if used_s >= seen_s.setdefault(rank, used_s) + WORK_S:
            seen_s[rank] = used_s
            supervisor.see_work(rank, time.monotonic())


def combine_without_interrupts(
    results: Mapping[int, Done], failures: Sequence[RankFailure], lost: Mapping[int, LostRank]
) -> Outcome:
    """The ranks' outcome, except for KeyboardInterrupts that this process sent them."""
    others = {rank: result for rank, result in results.items() if result.outcome != "interrupt"}
    return replace(combine(0, others, failures, lost), results=dict(results), session_end=None)
