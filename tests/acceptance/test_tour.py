"""The tour shows what happened: processes, time, and what a failure report looks like."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

FAILS = "test_one_rank_raises_while_the_others_wait_for_it"
HOOKED = """
def pytest_dcp_world_started(size, ready_s):
    assert ready_s > 0
    print(f"started: {size}")
"""
TESTS = """
import pytest

@pytest.mark.parametrize("world_size", [1, 2], indirect=False)
@pytest.mark.world_size()
def test_it(world_size):
    pass

def test_none():
    pass
"""


@pytest.fixture(scope="module")
def tour(make_suite: MakeSuite) -> SessionResult:
    chosen = f"{FAILS} or test_all_reduce_sums or test_a_list_of_sizes"
    return make_suite({}).run(
        "--pyargs", "pytest_dcp.demo", "-v", "-k", chosen, "-p", "no:randomly"
    )


def test_the_tour_passes(tour: SessionResult) -> None:
    assert tour.exit_code == pytest.ExitCode.OK, tour.output
    assert re.search(r"\d+ passed, .* 1 xfailed", tour.output)


def test_it_ends_with_the_worlds_their_processes_and_their_time(tour: SessionResult) -> None:
    told = tour.output.partition(" what happened ")[2]
    assert "5 worlds were started, 13 processes in all, one per rank." in told
    assert re.search(r"^  1 of size 1, ready in \d+ ms \(median\)$", told, re.M)
    assert re.search(r"^  2 of size 2, ready in \d+ ms \(median\)$", told, re.M)
    assert re.search(r"^  2 of size 4, ready in \d+ ms \(median\)$", told, re.M)


def test_it_ends_with_a_failure_report(tour: SessionResult) -> None:
    told = tour.output.partition(" an example failure ")[2]
    assert "\nrank 1: ValueError: the loss is nan\n" in told
    assert re.search(r"^  ranks 0,2-3: still in call, in all_reduce, at .*; killed$", told, re.M)
    assert '>           raise ValueError("the loss is nan")' in told


def test_the_hook_is_called_for_each_world_that_is_ready(make_suite: MakeSuite) -> None:
    suite = make_suite({})
    (suite.folder / "conftest.py").write_text(HOOKED)
    (suite.folder / "test_it.py").write_text(TESTS)
    output = suite.run("-s", "test_it.py").output
    assert sorted(re.findall(r"started: \d", output)) == ["started: 1", "started: 2"]
