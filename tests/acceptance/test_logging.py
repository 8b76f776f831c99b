"""pytest captures log records of ranks as it does those of ordinary tests beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

CONFTEST = """
import logging
from collections.abc import Generator

import pytest
from session_recorder import note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, object, object]:
    logging.getLogger("mine").warning("between two phases")
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for one in loggers for handler in getattr(one, "handlers", ())]
    note("left", handlers=[type(handler).__name__ for handler in handlers])
"""
CLASSES = ("TestBefore", "TestWarm", "TestBetween", "TestFresh", "TestAfter")
FAILS = "test_reports_its_own_logs"


@pytest.fixture(scope="module", params=["-q", "--log-level=INFO", "-x"])
def session(make_suite: MakeSuite, request: pytest.FixtureRequest) -> SessionResult:
    suite = make_suite({"conftest.py": CONFTEST, "test_logging.py": "logging_phases.py"})
    # With -x the first failure ends the session: of a test in a world, before another one.
    chosen = ("-k", "TestWarm or TestFresh") if request.param == "-x" else ()
    return suite.run(request.param, *chosen)


def test_a_phase_catches_the_same_logs_in_a_world_as_without(session: SessionResult) -> None:
    bad = {r.nodeid for r in session.reports if r.category not in ("", "passed")}
    ran = {report.nodeid.split("::")[1] for report in session.reports}
    assert ran in ({*CLASSES}, {"TestWarm"})
    assert bad == {f"test_logging.py::{one}::{FAILS}" for one in ran}


def test_a_report_shows_the_logs_of_its_own_phase(session: SessionResult) -> None:
    for report in session.reports:
        if report.nodeid.endswith(FAILS) and report.when == "call":
            (text,) = (text for title, text in report.sections if title.endswith("call"))
            assert "shown" in text
            assert "between" not in text


def test_no_handler_is_left_on_a_logger(session: SessionResult) -> None:
    left = [name for note in session.noted("left") for name in note["handlers"]]
    assert "LogCaptureHandler" not in left
