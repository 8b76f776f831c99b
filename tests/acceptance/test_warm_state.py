"""A test in a warm world finds the process as in a fresh one, and as its wider fixtures made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

HELPERS = """\
class Helper:
    def help_out(self):
        return 1

def help_out():
    return 1
"""
LOGS_AT_IMPORT = """\
import logging

logging.getLogger(f"{__name__}.inner").setLevel(logging.ERROR)
"""
REPLACED = ("test_interop_threads", "test_thread", "test_child", "test_mode")


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    files = {
        "test_warm_state.py": "warm_state.py",
        "state_changes.py": "state_changes.py",
        "helpers_of_suite.py": HELPERS,
        "logs_at_import.py": LOGS_AT_IMPORT,
    }
    return make_suite(files).run()


def failed(session: SessionResult, start: str) -> dict[str, str]:
    return {
        report.nodeid: report.text
        for report in session.reports
        if report.category in ("failed", "error") and f"::{start}" in report.nodeid
    }


def test_changes_of_a_test_are_put_back_for_the_next(session: SessionResult) -> None:
    assert failed(session, "test_changes") == {}
    assert failed(session, "test_sees") == {}


def test_changes_of_an_example_are_put_back_for_the_next(session: SessionResult) -> None:
    assert failed(session, "test_examples") == {}


def test_a_state_that_was_put_back_costs_no_world(session: SessionResult) -> None:
    assert len({note["pid"] for note in session.noted("world of the restored")}) == 1


@pytest.mark.parametrize("start", ["test_state", "TestLate", "test_after_the_class"])
def test_changes_of_a_fixture_of_wider_scope_last_as_long_as_it_does(
    session: SessionResult, start: str
) -> None:
    assert failed(session, start) == {}
    assert any(f"::{start}" in report.nodeid for report in session.reports)


def test_a_change_that_cannot_be_put_back_costs_a_world(session: SessionResult) -> None:
    assert failed(session, "test_after") == {}
    before = [note["pid"] for note in session.noted("before")]
    after = [note["pid"] for note in session.noted("after")]
    assert len({*before, *after}) == len(REPLACED) + 1


def test_a_change_that_cannot_be_put_back_is_named(session: SessionResult) -> None:
    told = [text for text in session.warnings if text.startswith("ChangedStateWarning")]
    assert len(told) == 2
    assert "test_interop_threads: has changed state that cannot be restored" in told[0]
    assert "torch's number of interop threads (rank 0)" in told[0]
    assert "test_mode" in told[1]
    assert "torch's inference mode" in told[1]
    left = [text for text in session.warnings if text.startswith("LeftBehindWarning")]
    assert len(left) == 1
    assert "test_child: rank 0 left process" in left[0]
