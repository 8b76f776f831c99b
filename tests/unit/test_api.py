"""The functions of `pytest_dcp.api`, outside of a world and in a fake rank."""

from __future__ import annotations

import contextlib
import doctest
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_dcp import api
from pytest_dcp.faults import Kill


class FakeRank:
    """A rank that records its calls."""

    rank = 1
    world_size = 2
    scratch_dir = Path("scratch")

    def __init__(self) -> None:
        self.asked: list[str] = []

    def meet(self, operation: str, payload: bytes = b"") -> list[bytes | None]:
        return [payload, None]

    def announce_death(self, reason: str) -> None:
        self.asked.append(reason)

    @contextlib.contextmanager
    def announce_failure(self, error: BaseException) -> Iterator[None]:
        self.asked.append(f"begin {error}")
        yield
        self.asked.append(f"end {error}")

    @contextlib.contextmanager
    def renew_for_examples(self, fixture: api.RenewedFixture) -> Iterator[None]:
        yield


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRank:
    rank = FakeRank()
    monkeypatch.setattr(api, "_rank", None)
    api.enter_rank(rank)
    return rank


def test_outside_of_a_world_there_is_no_rank_and_nothing_is_announced() -> None:
    assert api.current_rank() is None
    api.announce_death("nobody hears this")
    with api.announce_failure(ValueError("nor this")):
        pass


def test_a_rank_that_has_entered_is_the_current_one_and_hears_of_deaths(fake: FakeRank) -> None:
    assert api.current_rank() is fake
    api.announce_death("the trainer gives up")
    assert fake.asked == ["the trainer gives up"]


def test_a_failure_is_announced_around_the_block_and_only_where_there_is_one(
    fake: FakeRank,
) -> None:
    with api.announce_failure(None):
        pass
    assert fake.asked == []
    with api.announce_failure(ValueError("a")):
        fake.asked.append("block")
    assert fake.asked == ["begin a", "block", "end a"]


def test_a_fault_announces_the_death_of_the_rank_before_it_acts(
    fake: FakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kill, "act", lambda self: fake.asked.append("killed"))
    moment = object()
    Kill().before(moment)  # type: ignore[arg-type]  # only its text counts
    assert fake.asked == [f"{Kill()!r} at {moment}", "killed"]


def test_a_fault_that_would_end_the_session_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no rank of a world"):
        Kill().before(object())  # type: ignore[arg-type]  # only its text counts


def test_the_example_of_the_module_runs() -> None:
    results = doctest.testmod(api)
    assert results.attempted == 3
    assert results.failed == 0


@pytest.mark.parametrize(
    "module",
    ["pytest_dcp.api", "pytest_dcp.faults", "pytest_dcp.faults.fixtures", "pytest_dcp.plugin"],
)
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
