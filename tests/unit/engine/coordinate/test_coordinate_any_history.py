"""The decisions of coordinator and peers keep their promises in any history; see the simulator.

Planted bugs show that each promise is checked: a simulator that finds none of them checks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_dcp._engine.coordinate.admission import Admission
from pytest_dcp._engine.coordinate.coordinator_actions import (
    CoordinatorAction,
    PublishVerdict,
)
from pytest_dcp._engine.coordinate.coordinator_state import CoordinatorState
from pytest_dcp._engine.coordinate.failure import Cause
from pytest_dcp._engine.coordinate.frame import FrameKind, Head
from pytest_dcp._engine.coordinate.hello import Hello
from pytest_dcp._engine.coordinate.peer_state import LinkState, PeerAction, PeerState
from pytest_dcp._engine.coordinate.step_values import LocalResult, Result, StepVerdict
from support.coordinate_simulator import (
    History,
    Violated,
    Work,
    check_history,
    check_seeds,
    draw_history,
)

HISTORIES_PER_EXAMPLE = 12
"""So that the nightly profile runs 120,000."""


@given(st.integers(0, 10**9))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_ranks_keep_their_promises_in_any_history(first: int) -> None:
    assert check_seeds(range(first, first + HISTORIES_PER_EXAMPLE)) > 0


@given(st.randoms(use_true_random=False))
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_ranks_keep_their_promises_in_a_history_that_shrinks(random: Random) -> None:
    check_history(draw_history(random), random)


def test_most_histories_have_steps_that_succeed_and_all_kinds_of_trouble() -> None:
    """Else the promises would hold of nothing."""
    succeeded = failed = final = anew = 0
    for seed in range(400):
        random = Random(seed)
        for outcomes in check_history(draw_history(random), random).outcomes.values():
            for outcome in outcomes.values():
                succeeded += isinstance(outcome, Result)
                if isinstance(outcome, StepVerdict):
                    failed += not outcome.final
                    final += outcome.final
                    anew += outcome.epoch > 0
    assert succeeded > 300
    assert failed > 50
    assert final > 100
    assert anew > 0


class IgnoresFailures(CoordinatorState):
    """A step succeeds although a rank's local work failed."""

    def _causes(self) -> list[Cause]:
        return list(self._stuck.values())


class ForgetsLatePeers(CoordinatorState):
    """The final verdict is not published."""

    def _fail_step(self, causes: Sequence[Cause]) -> list[CoordinatorAction]:
        actions = super()._fail_step(causes)
        return [action for action in actions if not isinstance(action, PublishVerdict)]


class MeetsAnyOperation(CoordinatorState):
    """Peers of another operation take part in this one."""

    def receive_hello(
        self, hello: Hello, *, has_left: bool, waited_s: float
    ) -> Admission | StepVerdict | None:
        return Admission.JOIN


class CountsTwice(CoordinatorState):
    """One rank's result counts for another's, too."""

    def hear(
        self, rank: int, kind: FrameKind, head: Head, result: LocalResult | ValueError
    ) -> list[CoordinatorAction]:
        actions = super().hear(rank, kind, head, result)
        if self.missing and isinstance(result, LocalResult):
            self._local_results[self.missing.pop()] = result
        return actions


class WaitsForever(CoordinatorState):
    """Silent ranks are waited for."""

    def look_around(
        self,
        now: float,
        heard_s: Mapping[int, float],
        *,
        end_reasons: Mapping[int, str] | None = None,
        refusal: Cause | None = None,
    ) -> list[CoordinatorAction]:
        return super().look_around(self._since_s, heard_s, end_reasons=end_reasons, refusal=refusal)


class DoesNotWaitForBusyRanks(CoordinatorState):
    """The verdict is given at the first failure."""

    def _alert(self, cause: Cause) -> list[CoordinatorAction]:
        self.missing.clear()
        return super()._alert(cause)


class NamesEchoes(CoordinatorState):
    """Ranks that only gave up their work are named as failed."""

    def _causes(self) -> list[Cause]:
        results = self._local_results.values()
        stated = {one.cause.rank: one.cause for one in results if one.cause is not None}
        return list((stated | self._stuck).values())


class TakesResultsOfOtherSteps(CoordinatorState):
    """A value counts even if it was stated for another step."""

    def hear(
        self, rank: int, kind: FrameKind, head: Head, result: LocalResult | ValueError
    ) -> list[CoordinatorAction]:
        return super().hear(rank, kind, self._head, result)


class HasNoPatience(PeerState):
    """A peer gives the coordinator up between two signs of life."""

    @property
    def _patience_s(self) -> float:
        return self.context.timeout_s / 8


class NeverComesBack(PeerState):
    """A peer that strangers crowded out does not say hello again."""

    def _find_reconnect(self, now: float, link: LinkState, since_s: float) -> None:
        return None


class MissesTheEnd(PeerState):
    """A peer does not see that the connection ended, nor that the coordinator is silent."""

    def decide(self, now: float, link: LinkState) -> PeerAction | None:
        return super().decide(self._since_s, LinkState(now))


@pytest.mark.parametrize(
    ("bug", "text"),
    [
        (IgnoresFailures, "succeeds in operation"),
        (ForgetsLatePeers, "names|ends as|fails for some"),
        (MeetsAnyOperation, "values of other steps|succeeds in operation"),
        (CountsTwice, "values of other steps|succeeds in operation|works on"),
        (WaitsForever, "without a bound|waited for"),
        (DoesNotWaitForBusyRanks, "works on"),
        (NamesEchoes, "names|ends as"),
        (TakesResultsOfOtherSteps, "names|ends as|values of other steps"),
        (HasNoPatience, "names|ends as"),
        (NeverComesBack, "names|ends as"),
        (MissesTheEnd, "without a bound|waited for"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_planted_bug_is_found(bug: type[Any], text: str) -> None:
    made = {"make_peer" if issubclass(bug, PeerState) else "make": bug}
    with pytest.raises(Violated, match=text):
        check_seeds(range(3000), **made)


def test_a_late_peer_gets_the_verdict_of_the_operation_that_it_missed() -> None:
    """It was stopped for longer than the timeout before it came."""
    late = Work(lasts_s=9.0, checks=False)
    history = History(3, [[[Work(), Work(), late]]])
    outcomes = check_history(history, Random(1)).outcomes[(0, 1), 1]
    assert {type(outcome) for outcome in outcomes.values()} == {StepVerdict}
    assert len(outcomes) == 3
