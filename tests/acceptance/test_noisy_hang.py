"""DEBUG lines of loggers do not bury the report of a hang."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

LEFT_OUT = "[... {} DEBUG lines left out: --log-level=DEBUG shows them ...]"


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_noisy_hang.py": "noisy_hang.py"})


@pytest.fixture(scope="module")
def session(suite: Suite) -> SessionResult:
    return suite.run()


def logs(session: SessionResult, test: str) -> dict[str, str]:
    """Title -> text of the captured logs in the last report of a test."""
    sections = session.phases(test)["call"].sections
    return {title: text for title, text in sections if title.startswith("Captured log")}


def test_a_hang_counts_debug_lines_also_those_of_earlier_phases(session: SessionResult) -> None:
    shown = logs(session, "test_hangs")
    info = "INFO     noisy:test_noisy_hang.py:23 ready\n"
    warning = "WARNING  noisy:test_noisy_hang.py:29 careful\n"
    assert shown == {
        "Captured log [ranks 0-1] setup": info + LEFT_OUT.format(200),
        "Captured log [rank 0] call": warning + LEFT_OUT.format(200),
    }


def test_torch_s_own_traces_are_counted_too(session: SessionResult) -> None:
    (text,) = logs(session, "test_hangs_after_compiling").values()
    assert text.startswith("[... ")
    assert text.endswith(" DEBUG lines left out: --log-level=DEBUG shows them ...]")


def test_another_failure_shows_all_lines(session: SessionResult) -> None:
    shown = logs(session, "test_fails")
    assert shown["Captured log [rank 0] setup"].count("DEBUG") == 200
    assert "the last words" in shown["Captured log [ranks 0-1] call"]


def test_events_of_a_save_are_left_out_of_the_log(session: SessionResult) -> None:
    (text,) = logs(session, "test_fails_after_a_save").values()
    assert text == "WARNING  c10d-other:test_noisy_hang.py:40 a warning of torch's"


def test_events_of_a_save_are_shown_on_demand(suite: Suite) -> None:
    session = suite.run("-k", "after_a_save", "--log-level=DEBUG")
    shown = logs(session, "test_fails_after_a_save")
    assert "'event': 'start'" in shown["Captured log [rank 0] call"]


def test_lines_that_were_asked_for_are_shown(suite: Suite) -> None:
    session = suite.run("-k", "test_hangs and not compiling", "--log-level=DEBUG")
    assert logs(session, "test_hangs")["Captured log [rank 0] call"].count("DEBUG") == 200
