"""Tests of torch's multi-process classes: refused with the way to port them, and ported.

Whole sessions over `samples/torch_test_cases.py` and `samples/ported.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import pytest_dcp

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

UNMARKED = """
import unittest
from pytest_dcp import WorldTestMixin

class TestUnmarked(WorldTestMixin, unittest.TestCase):
    def test_method(self):
        pass
"""


@pytest.fixture(scope="module")
def refused(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_torch_cases.py": "torch_test_cases.py"}).run()


@pytest.fixture(scope="module")
def ported(make_suite: MakeSuite) -> SessionResult:
    suite = make_suite({"test_ported.py": "ported.py", "test_unmarked.py": UNMARKED})
    return suite.run()


@pytest.mark.parametrize(
    ("test", "base"),
    [
        ("TestProcesses", "MultiProcessTestCase"),
        ("TestThreads", "MultiThreadedTestCase"),
        ("TestTensors", "DTensorTestBase"),
    ],
)
def test_the_marker_on_a_class_with_ranks_of_its_own_is_refused_with_the_way_to_port_it(
    refused: SessionResult, test: str, base: str
) -> None:
    assert (
        f"test_torch_cases.py::{test}::test_method: @pytest.mark.world_size is on a test of {base},"
        f" which starts ranks of its own. To run it in a world, have {test} inherit from "
        f"pytest_dcp.WorldTestMixin and TestCase instead of {base}"
    ) in refused.output


def test_a_refused_class_is_a_usage_error_and_an_unmarked_one_is_torch_s(
    refused: SessionResult,
) -> None:
    assert refused.exit_code == pytest.ExitCode.USAGE_ERROR
    assert refused.noted("ran") == []
    assert "TestLeftToTorch" not in refused.output


def test_a_ported_test_runs_in_a_world(ported: SessionResult) -> None:
    assert ported.outcomes("TestTensors::test_tensor") == {"call": "passed"}
    assert {note["rank"] for note in ported.noted("set up")} == {0, 1}


def test_a_class_without_unittest_can_use_the_mixin(ported: SessionResult) -> None:
    assert ported.outcomes("TestWithoutUnittest::test_mesh") == {"call": "passed"}


def test_torch_s_own_skips_are_skips(ported: SessionResult) -> None:
    assert ported.outcomes("TestTensors::test_needs_gpus") == {"call": "skipped"}


def test_a_ported_test_that_fails_names_its_rank(ported: SessionResult) -> None:
    report = ported.bad("TestTensors::test_fails_in_a_rank")
    assert report.headline.startswith("rank 1: AssertionError: Scalars are not equal!")


def test_a_size_of_the_class_s_own_must_be_the_marker_s(ported: SessionResult) -> None:
    report = ported.bad("TestOfAnotherSize::test_method")
    assert "TestOfAnotherSize.world_size is 4, but the marker asks for a world of 2" in report.text
    assert ported.noted("ran") == []


def test_a_ported_class_without_the_marker_is_asked_for_one(ported: SessionResult) -> None:
    report = ported.bad("TestUnmarked::test_method")
    assert "mark the test with @pytest.mark.world_size(n)" in report.text


def test_the_mixin_is_public_and_other_names_are_not_there() -> None:
    assert pytest_dcp.WorldTestMixin.__module__ == "pytest_dcp._harness.controller.world_test_mixin"
    with pytest.raises(AttributeError, match="module 'pytest_dcp' has no attribute 'Nothing'"):
        _ = pytest_dcp.Nothing
