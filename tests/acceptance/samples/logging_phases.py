"""Copied as test_logging.py: pytest catches the same log records with a world and without."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

mine = logging.getLogger("mine")
aloof = logging.getLogger("aloof")
aloof.propagate = False
turned = logging.getLogger("turned")
turned.propagate = False


class Phases:
    """Run in order: a test may find the loggers as the previous test left them."""

    @pytest.fixture
    def made(self, caplog: pytest.LogCaptureFixture) -> Iterator[logging.Logger]:
        logger = logging.getLogger(f"made for {type(self).__name__}")
        logger.propagate = False
        mine.warning("in setup")
        yield logger
        mine.warning("in teardown")
        assert caplog.messages == ["in teardown"]
        assert [r.getMessage() for r in caplog.get_records("call")] == ["a", "b", "c"]

    def test_every_phase_has_its_own(
        self, made: logging.Logger, caplog: pytest.LogCaptureFixture
    ) -> None:
        aloof.warning("a")
        made.warning("b")
        mine.warning("c")
        assert caplog.messages == ["a", "b", "c"]
        assert [r.getMessage() for r in caplog.get_records("setup")] == ["in setup"]

    def test_takes_the_handlers_off(self) -> None:
        logging.getLogger().handlers.clear()
        aloof.handlers.clear()

    def test_they_hang_again(self, caplog: pytest.LogCaptureFixture) -> None:
        aloof.warning("a")
        mine.warning("b")
        assert caplog.messages == ["a", "b"]

    def test_turns_one_round(self) -> None:
        turned.propagate = True

    def test_it_is_caught_once(self, caplog: pytest.LogCaptureFixture) -> None:
        turned.warning("once")
        turned.propagate = False
        assert caplog.messages == ["once"]

    def test_sets_a_level(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        mine.debug("heard")
        assert caplog.messages == ["heard"]

    def test_the_level_is_the_options_again(
        self, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
    ) -> None:
        mine.info("heard with --log-level=INFO")
        mine.debug("never heard")
        assert len(caplog.messages) == (request.config.getoption("log_level") == "INFO")

    def test_reports_its_own_logs(self) -> None:
        mine.warning("shown")
        raise ValueError("boom")


class TestBefore(Phases):
    pass


@pytest.mark.world_size(2, isolation="module")
class TestWarm(Phases):
    pass


class TestBetween(Phases):
    pass


@pytest.mark.world_size(2)
class TestFresh(Phases):
    pass


class TestAfter(Phases):
    pass
