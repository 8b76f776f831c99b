"""However a warm world ends, its ranks tear down every scope, and its last test gets the errors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, Report, SessionResult

QUIET = ("unmarked", "other_spec", "skipped", "death", "class", "module", "property")
"""Endings that let the session go on."""
STOPPING = {
    "fails": (["-x"], pytest.ExitCode.TESTS_FAILED),
    "interrupted": ([], pytest.ExitCode.INTERRUPTED),
    "exits": ([], 5),
    "stops": ([], pytest.ExitCode.INTERRUPTED),
}


@pytest.fixture(scope="module")
def quiet(make_suite: MakeSuite) -> SessionResult:
    """One session of several modules, each with another ending."""
    return make_suite({f"test_{name}.py": "warm_endings.py" for name in QUIET}).run()


def errors(session: SessionResult, ending: str) -> dict[str, list[Report]]:
    """The errors at the teardown of the tests of one module."""
    found: dict[str, list[Report]] = {}
    for report in session.reports:
        if report.category == "error" and report.nodeid.startswith(f"test_{ending}.py::"):
            assert report.when == "teardown"
            found.setdefault(report.nodeid.rpartition("::")[2], []).append(report)
    return found


def torn_down(session: SessionResult, ending: str) -> Counter[str]:
    """How often each scope was torn down, over all ranks."""
    return Counter(n["scope"] for n in session.noted("torn down") if n["ending"] == ending)


@pytest.mark.parametrize("ending", ["unmarked", "other_spec", "skipped", "module"])
def test_the_last_test_of_a_warm_world_gets_the_errors_of_its_teardown(
    quiet: SessionResult, ending: str
) -> None:
    assert torn_down(quiet, ending) == {"module": 2, "session": 2}
    found = errors(quiet, ending)
    assert list(found) == ["test_owner"]
    (error,) = found["test_owner"]
    assert error.headline == f"ranks 0-1: RuntimeError: torn down at the end of {ending}"


def test_no_test_fails_for_the_teardown_of_another(quiet: SessionResult) -> None:
    failed = [r.nodeid for r in quiet.reports if r.when != "teardown" and r.category == "failed"]
    assert failed == ["test_property.py::test_property"]
    assert not [r for r in quiet.reports if r.when != "teardown" and r.category == "error"]
    assert quiet.exit_code == pytest.ExitCode.TESTS_FAILED
    assert quiet.left_running == ()
    assert quiet.left_in_tmpdir == ()


def test_a_class_is_torn_down_when_the_world_goes_on_without_it(quiet: SessionResult) -> None:
    assert torn_down(quiet, "class") == {"class": 2, "module": 2, "session": 2}
    found = errors(quiet, "class")
    (of_class,) = found["test_in_class"]
    assert of_class.headline == "ranks 0-1: RuntimeError: torn down with the class"
    assert any("the class is torn down" in text for _, text in of_class.sections)


def test_the_death_of_an_idle_rank_is_the_failure_of_the_test_before(quiet: SessionResult) -> None:
    (error,) = errors(quiet, "death")["test_owner"]
    assert error.headline == "rank 1: was killed by signal 9 (SIGKILL) after teardown"
    # The other rank tore down its fixtures; the dead one could not.
    assert torn_down(quiet, "death") == {"module": 1, "session": 1}
    assert "torn down at the end of death" in error.text
    assert len(quiet.noted("after the death")) == 2


def test_a_world_that_an_example_broke_is_torn_down_before_it_is_replaced(
    quiet: SessionResult,
) -> None:
    said = [note for note in quiet.notes if note["about"] in ("set up", "torn down")]
    of_rank_0 = Counter(
        n["about"]
        for n in said
        if (n["ending"], n["scope"], n["rank"]) == ("property", "module", "0")
    )
    assert of_rank_0["set up"] > 2
    assert of_rank_0["torn down"] == of_rank_0["set up"]
    assert quiet.outcomes("test_property") == {"call": "failed", "teardown": "error"}
    (error,) = errors(quiet, "property")["test_property"]
    assert error.headline == "rank 0: RuntimeError: torn down at the end of property"


@pytest.mark.parametrize("ending", STOPPING)
def test_a_session_that_stops_tears_idle_worlds_down(make_suite: MakeSuite, ending: str) -> None:
    args, exit_code = STOPPING[ending]
    session = make_suite({f"test_{ending}.py": "warm_endings.py"}).run(*args)
    assert torn_down(session, ending) == {"module": 2, "session": 2}
    (error,) = errors(session, ending)["test_owner"]
    assert error.headline == f"ranks 0-1: RuntimeError: torn down at the end of {ending}"
    assert f"torn down at the end of {ending}" in session.output
    assert session.exit_code == exit_code
    assert session.left_running == ()


def test_workers_of_xdist_report_for_the_last_test_too(make_suite: MakeSuite) -> None:
    endings = ("unmarked", "other_spec", "death")
    suite = make_suite({f"test_{name}.py": "warm_endings.py" for name in endings})
    session = suite.run("-n1", "--dist=loadfile")
    assert "INTERNALERROR" not in session.output
    for ending in endings:
        (error,) = errors(session, ending)["test_owner"]
        assert f"torn down at the end of {ending}" in error.text
    assert {r.category for r in session.reports if r.when != "teardown"} <= {"passed", ""}
