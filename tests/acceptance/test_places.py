"""Time counts while a rank is in the test itself: not in imports, collection or its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

IMPORT_S = 12.0


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    files = {
        "test_slow_places.py": "slow_places.py",
        "conftest.py": "slow_places_conftest.py",
        "slow_import.py": f"import time\ntime.sleep({IMPORT_S})\n",
    }
    return make_suite(files, ini="dcp_grace = 0.5").run("-p", "pytest_dcp")


def test_the_first_test_does_not_pay_for_the_imports_of_its_ranks(session: SessionResult) -> None:
    assert session.outcomes("test_first") == {"call": "passed"}
    assert session.phases("test_first")["setup"].duration_s < IMPORT_S


def test_peers_that_write_their_own_report_are_waited_for(session: SessionResult) -> None:
    text = session.bad("test_peers_report_slowly").text
    heading = "\n".join(text.splitlines()[:2])  # whichever came first is on top
    assert "ranks 0-1: ValueError: boom" in heading
    assert "rank 2: ValueError: another" in heading
    assert "still in call" not in text
    assert "slow = <shown after 3 s>" in text


def test_a_report_is_no_part_of_the_test_s_time(session: SessionResult) -> None:
    report = session.bad("test_reports_beyond_the_limit")
    assert report.headline == "rank 1: AssertionError: assert 1 == 0"


def test_the_error_of_a_rank_that_dies_while_it_reports_is_named(session: SessionResult) -> None:
    report = session.bad("test_dies_while_it_reports")
    assert report.headline == (
        "rank 1: exited with code 4 in call, without a verdict; it had raised ValueError: boom"
    )


@pytest.mark.parametrize("test", ["test_text_is_slow", "test_text_is_slow_in_a_function"])
def test_an_exception_s_text_that_takes_long_is_waited_for(
    session: SessionResult, test: str
) -> None:
    text = session.bad(test).text
    assert "rank 0: ValueError: boom" in text
    assert "rank 1: SlowToTellError: told late" in text
    assert "still in call" not in text


@pytest.mark.parametrize("of", ["law_of_an_engine", "recording"])
def test_an_error_that_the_peers_do_not_come_to_hear_of_is_the_cause(
    session: SessionResult, of: str
) -> None:
    report = session.bad(f"test_{of}_that_fails_on_one_rank")
    assert report.headline == (
        "rank 0: ValueError: met by rank 0 alone (killed: it waited for its peers to receive that)"
    )
    assert "rank 1: still in call at the time limit of 3 s, in recv, at " in report.text
    assert 'raise ValueError("met by rank 0 alone")' in report.text  # with its traceback


def test_a_spawned_rank_s_collection_is_not_timed_and_its_setup_is(make_suite: MakeSuite) -> None:
    suite = make_suite({"test_spawned_places.py": "spawned_places.py"})
    session = suite.run("--dcp-launch=spawn")
    hang = session.phases("test_hangs_in_setup")["setup"]
    assert session.outcomes("test_passes") == {"call": "passed"}
    assert hang.headline.startswith("rank 1: still in setup at the time limit of 3 s, at ")
    assert hang.duration_s < 100
