"""Data that plugins gather in ranks reaches the controller, or an error names the plugin."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

PASSED = {"call": "passed"}
USAGE_ERROR = 4


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    files = {"test_carrying.py": "carrying.py", "conftest.py": "carrying_conftest.py"}
    return make_suite(files, ini="junit_family = xunit1")


@pytest.fixture(scope="module")
def forked(suite: Suite) -> SessionResult:
    return suite.run("--junitxml=forked.xml")


@pytest.fixture(scope="module")
def spawned(suite: Suite) -> SessionResult:
    options = ("--junitxml=spawned.xml", "--dcp-launch=spawn")
    return suite.run(*options, "-k", "test_records or test_gathers")


@pytest.mark.parametrize("launch", ["forked", "spawned"])
def test_properties_of_the_suite_and_attributes_of_tests_are_in_the_junit_file(
    request: pytest.FixtureRequest, launch: str
) -> None:
    session: SessionResult = request.getfixturevalue(launch)
    assert session.outcomes("test_records") == PASSED
    suite = ET.parse(Path(session.cwd, f"{launch}.xml")).getroot()[0]
    found = {(one.get("name"), one.get("value")) for one in suite.iterfind("properties/property")}
    assert found == {("arch", "of all"), ("rank [rank 0]", "0"), ("rank [rank 1]", "1")}
    (case,) = (one for one in suite.iterfind("testcase") if one.get("name") == "test_records")
    assert case.get("assertions") == "five"


def taken(session: SessionResult, item: str) -> list[object]:
    return [note["states"] for note in session.noted("taken") if note["item"] == item]


@pytest.mark.parametrize("launch", ["forked", "spawned"])
def test_a_plugin_gets_the_state_that_it_gathered_in_each_rank(
    request: pytest.FixtureRequest, launch: str
) -> None:
    session: SessionResult = request.getfixturevalue(launch)
    assert taken(session, "test_gathers") == [[["by 0"], None, ["by 2"]]]


def test_it_gets_it_once_for_each_test_also_of_a_warm_world_and_of_one_that_fails(
    forked: SessionResult,
) -> None:
    assert taken(forked, "test_first") == [[["first 0"], ["first 1"]]]
    assert taken(forked, "test_second") == []
    assert taken(forked, "test_fails") == [[["before it failed"]] * 2]
    assert taken(forked, "test_ordinary") == []


def test_a_state_that_cannot_be_pickled_is_an_error_that_names_the_plugin(
    forked: SessionResult,
) -> None:
    report = forked.bad("test_cannot_be_pickled")
    assert report.when == "teardown"
    assert re.search(
        r"DcpError: the value that the plugin '.*conftest.py' returned from pytest_dcp_rank_state, "
        "a list, cannot be pickled: cannot pickle '_thread.lock' object",
        report.text,
    )


def test_state_that_no_plugin_takes_is_a_warning_that_names_it(forked: SessionResult) -> None:
    (text,) = (text for text in forked.warnings if text.startswith("LostStateWarning: "))
    assert "::test_gathers: data of the plugin 'has-no-taker' from ranks 0-2 is lost" in text


# Plugins that are known to keep their state in one process; stand-ins with their names.

STAND_IN = """
import pytest

@pytest.fixture
def {fixture}():
    return 1
"""
USES = """
import pytest

@pytest.mark.world_size(1)
def test_marked({fixture}): pass

def test_ordinary({fixture}): pass
"""
CARRIES = """
def pytest_dcp_carries(fixture):
    return True if fixture == "{fixture}" else None
"""


def with_plugin(
    make_suite: MakeSuite, package: str, fixture: str, conftest: str = "\n"
) -> SessionResult:
    files = {
        f"{package}/__init__.py": STAND_IN.format(fixture=fixture),
        "test_uses.py": USES.format(fixture=fixture),
        "conftest.py": conftest.format(fixture=fixture),
    }
    return make_suite(files).run("-p", package)


@pytest.mark.parametrize("package", ["syrupy", "snapshottest"])
def test_snapshots_of_marked_tests_are_refused_before_anything_runs(
    make_suite: MakeSuite, package: str
) -> None:
    session = with_plugin(make_suite, package, "snapshot")
    assert session.exit_code == USAGE_ERROR
    assert f"test_marked: uses the fixture 'snapshot' of {package}, which keeps" in session.output
    assert "test_ordinary: uses" not in session.output
    assert session.reports == ()


@pytest.mark.parametrize(
    ("package", "fixture", "plugin"),
    [
        ("pytest_benchmark", "benchmark", "pytest-benchmark"),
        ("pytest_jsonreport", "json_metadata", "pytest-json-report"),
    ],
)
def test_results_that_will_be_missing_are_warned_of_by_name(
    make_suite: MakeSuite, package: str, fixture: str, plugin: str
) -> None:
    session = with_plugin(make_suite, package, fixture)
    assert session.outcomes("test_marked") == PASSED
    (text,) = session.warnings
    assert text.startswith(
        f"LostStateWarning: test_uses.py::test_marked: uses the fixture {fixture!r} of {plugin}"
    )


def test_a_plugin_that_carries_the_state_lifts_the_refusal(make_suite: MakeSuite) -> None:
    session = with_plugin(make_suite, "syrupy", "snapshot", CARRIES)
    assert session.outcomes("test_marked") == PASSED
    assert session.warnings == ()


def test_a_fixture_of_that_name_of_the_suite_s_own_is_an_ordinary_one(
    make_suite: MakeSuite,
) -> None:
    files = {
        "conftest.py": STAND_IN.format(fixture="snapshot"),
        "test_uses.py": USES.format(fixture="snapshot"),
    }
    session = make_suite(files).run()
    assert session.outcomes("test_marked") == PASSED
    assert session.warnings == ()
