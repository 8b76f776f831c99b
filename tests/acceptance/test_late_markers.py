"""A marker that comes after collection counts, is refused, or fails the test: never silently lost.

Whole sessions over `samples/late_markers.py`, whose conftest adds markers at every point of a
session, and over a module whose marker is inherited by items that are no test functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

IN_TIME = ("test_added_in_time", "test_the_same_again")
LATE = {
    "test_added_in_the_loop": {"setup": "error"},
    "test_added_in_the_loop_expected_to_fail": {"setup": "error"},
    "test_added_before_setup": {"setup": "error"},
    "test_added_before_call": {"call": "failed"},
    "test_added_in_a_fixture": {"setup": "error"},
    "test_added_in_teardown": {"call": "passed", "teardown": "error"},
    "test_added_in_the_body": {"call": "failed"},
    "test_added_to_the_module_in_the_body_and_skipped": {"call": "failed"},
    "test_another_in_a_rank_s_fixture": {"setup": "error"},
    "test_another_in_one_rank_s_body": {"call": "failed"},
}
WRONG = {
    "test_gets_a_list": "holds a list of sizes in a place that cannot be parametrised",
    "test_gets_zero": "takes a size from 1 to 1024; got 0",
    "test_gets_a_typing_error": "has no keyword 'backnd'; it takes backend, device, mesh,",
}


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    files = {"test_late_markers.py": "late_markers.py", "conftest.py": "late_markers_conftest.py"}
    return make_suite(files)


@pytest.fixture(scope="module")
def session(suite: Suite) -> SessionResult:
    return suite.run()


def test_a_marker_that_is_added_in_time_counts(session: SessionResult) -> None:
    for test in IN_TIME:
        assert session.outcomes(test) == {"call": "passed"}
        assert [n["size"] for n in session.noted("ran") if n["test"] == test] == ["2", "2"]


@pytest.mark.parametrize("test", LATE)
def test_a_marker_that_comes_too_late_is_an_error(session: SessionResult, test: str) -> None:
    report = session.bad(test)
    assert session.outcomes(test) == LATE[test]
    assert "@pytest.mark.world_size(" in report.text
    assert f"::{test}: " not in report.text  # the heading and the summary name the test
    assert "was added too late to give the test a world" in report.text
    assert report.xfail is None


def test_a_test_without_its_world_does_not_run(session: SessionResult) -> None:
    ordinary = {*WRONG}
    assert {note["test"] for note in session.noted("ran")} == {*IN_TIME, *ordinary}


def test_the_rank_that_added_a_marker_is_named(session: SessionResult) -> None:
    report = session.bad("test_another_in_one_rank_s_body")
    assert report.headline.startswith("rank 1: LateMarkerError: ")
    assert "@pytest.mark.world_size(4)" in report.headline


@pytest.mark.parametrize("options", [("-n0",), ("-n2",), ("--collect-only",)])
def test_a_wrong_marker_that_is_added_later_is_a_usage_error(
    suite: Suite, options: tuple[str, ...]
) -> None:
    session = suite.run(*options, env={"ADD": "wrong"})
    assert session.exit_code == pytest.ExitCode.USAGE_ERROR
    assert session.noted("ran") == []
    assert "INTERNALERROR" not in session.output
    for test, text in WRONG.items():
        assert f"test_late_markers.py::{test}: @pytest.mark.world_size {text}" in session.output


def test_a_rank_runs_its_test_though_the_controller_s_were_reordered(suite: Suite) -> None:
    session = suite.run("-k", "the_same_again or in_time", env={"ADD": "new order"})
    assert session.exit_code == 0
    assert {n["test"] for n in session.noted("ran")} == {*IN_TIME}


# Items that are no test functions.


@pytest.mark.parametrize("distribution", ["-n0", "-n2"])
def test_an_inherited_marker_leaves_doctests_ordinary(
    make_suite: MakeSuite, distribution: str
) -> None:
    suite = make_suite({"test_inherited_marker.py": "inherited_marker.py"})
    session = suite.run("--doctest-modules", distribution)
    assert session.exit_code == 0
    assert sorted((n["rank"], n["size"]) for n in session.noted("ran")) == [(0, 2), (1, 2)]
    assert [r.category for r in session.reports if r.when == "call"] == ["passed"] * 4


def test_an_inherited_marker_of_doctests_alone_starts_no_world(make_suite: MakeSuite) -> None:
    suite = make_suite({"test_inherited_marker.py": "inherited_marker.py"})
    session = suite.run("--doctest-modules", "--deselect=test_inherited_marker.py::TestInClass")
    assert session.exit_code == 0
    assert {r.children for r in session.reports if r.when == "setup"} == {0}


def test_a_marker_on_a_doctest_itself_is_a_usage_error(suite: Suite) -> None:
    session = suite.run("--doctest-modules", env={"ADD": "doctest"})
    assert session.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "cannot run a DoctestItem in a world, only a test function" in session.output


# A fixture that is asked for too late.

DYNAMIC = """
def test_asks_for_worlds_by_name_only(request):
    request.getfixturevalue("worlds")
"""


def test_worlds_that_no_argument_asks_for_are_refused(
    make_suite: MakeSuite,
) -> None:
    session = make_suite({"test_dynamic.py": DYNAMIC}).run()
    report = session.bad("test_asks_for_worlds_by_name_only")
    assert "name the fixture `worlds` in the arguments of a test or a fixture" in report.text
