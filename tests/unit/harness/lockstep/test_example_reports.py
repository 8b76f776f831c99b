"""A rank that an example of a property failed in says so before it makes the exception's text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_dcp._harness.lockstep.example_messages import Attempt, Status
from pytest_dcp._harness.protocol.messages import At
from pytest_dcp._harness.rank.example_runner import ExampleRunner


class FakeRank:
    """Keeps the messages it sends, and has nothing to count."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.renewed: list[Any] = []
        self.channel = self
        self.seed = 0
        self.order = SimpleNamespace(size=1)

    def send(self, message: At) -> None:
        self.log.append(f"{message.place}: {message.text}")

    def reseed_torch(self, seed: int) -> None:
        pass

    def count_groups(self) -> FakeRank:
        return self

    def mark(self) -> dict[str, Any]:
        return {}

    def since(self, before: dict[str, Any]) -> dict[str, Any]:
        return {}


class LoggedTextError(Exception):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __str__(self) -> str:
        self.log.append("the text")
        return "boom"


def example(
    log: list[str],
    error: BaseException | None,
    monkeypatch: pytest.MonkeyPatch,
    status: Status = "interesting",
) -> Any:
    """The answer of a rank in which an example came to this."""
    follower = ExampleRunner.__new__(ExampleRunner)
    follower.rank = FakeRank(log)  # type: ignore[assignment]
    follower.record = SimpleNamespace(drawn=(0, 0))  # type: ignore[assignment]
    follower._state = SimpleNamespace(put_back=tuple)  # type: ignore[assignment]
    data = SimpleNamespace(
        events={}, invalid_location=None, target_observations={}, draw_times={}, misaligned_at=None
    )
    monkeypatch.setattr(follower, "_run", lambda state, attempt: (status, error, data))
    return follower._example(None, Attempt((), None, None, final=False))  # type: ignore[arg-type]


def test_a_failed_example_is_known_to_be_reported_before_its_text_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    done = example(log, LoggedTextError(log), monkeypatch)
    assert log[0] == "reporting: LoggedTextError"
    assert "the text" in log
    assert (done.outcome, done.text) == ("failed", "LoggedTextError: boom")


@pytest.mark.parametrize("status", ["valid", "invalid"])
def test_an_example_without_an_error_says_nothing_more(
    monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    log: list[str] = []
    assert example(log, None, monkeypatch, status).outcome == "passed"
    assert log == []
