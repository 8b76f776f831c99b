"""When an example is given up though a rank has not ended it, by a fake clock."""

from __future__ import annotations

import pickle
import types

import pytest

from pytest_dcp._harness.lockstep import engine as subject
from pytest_dcp._harness.lockstep.example_messages import Reply
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp.errors import RankFailure

FAILED = [RankFailure(1, "failed", "call", 0.0, "ValueError: boom")]
REJECTED = {0: Done("call", "passed", 0.0, payload=pickle.dumps(Reply("invalid", (0, 0))))}
STEP_S = 0.01


class FakeWorld:
    """Two ranks that drew nothing, and work until some time."""

    def __init__(self, works_until_s: float) -> None:
        self.spec = types.SimpleNamespace(size=2)
        self.now_s = 0.0
        self.works_until_s = works_until_s

    def at_work(self, rank: int) -> bool:
        return self.now_s < self.works_until_s

    def draws(self, rank: int) -> bytes:
        return b""


def given_up_after_s(
    monkeypatch: pytest.MonkeyPatch, works_until_s: float, busy_s: float, *, rejected: bool
) -> tuple[float, bool]:
    """When the example was given up, and whether its patience was in vain."""
    world = FakeWorld(works_until_s)
    monkeypatch.setattr(subject.time, "monotonic", lambda: world.now_s)
    impatience = subject.EarlyDecision(world, final=False, busy_s=busy_s)  # type: ignore[arg-type]
    for _ in range(1000):
        if impatience.is_decided(REJECTED if rejected else {}, [] if rejected else FAILED):
            return world.now_s, impatience.in_vain
        world.now_s += STEP_S
    raise AssertionError("it is waited for ever")


@pytest.mark.parametrize(
    ("works_until_s", "rejected", "expected_s"),
    [
        (0.0, False, subject.PATIENCE_S),
        (0.0, True, subject.DRAWS_LOOK_S + subject.PATIENCE_S),
        (0.4, False, 0.4 + subject.PATIENCE_S),
        (0.4, True, 0.4 + subject.PATIENCE_S),
    ],
)
def test_peers_are_waited_for_while_they_work(
    monkeypatch: pytest.MonkeyPatch, works_until_s: float, rejected: bool, expected_s: float
) -> None:
    after_s, in_vain = given_up_after_s(monkeypatch, works_until_s, 1.0, rejected=rejected)
    assert after_s == pytest.approx(expected_s, abs=2 * STEP_S)
    assert not in_vain


@pytest.mark.parametrize(("rejected", "decided_s"), [(False, 0.0), (True, subject.DRAWS_LOOK_S)])
def test_peers_that_never_rest_are_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch, rejected: bool, decided_s: float
) -> None:
    after_s, in_vain = given_up_after_s(monkeypatch, float("inf"), 0.5, rejected=rejected)
    assert after_s == pytest.approx(decided_s + 0.5, abs=2 * STEP_S)
    assert in_vain
