"""Ranks that end because the test asks for it: the survivors decide, and nothing else is forgiven.

One session runs all the cases; others run some of them on spawned ranks and in xdist's workers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

SIGKILLED = r"was killed by signal 9 \(SIGKILL\)"


@dataclass(frozen=True, slots=True)
class Lost:
    """A test that passes, and the line that reports the rank it lost."""

    test: str
    line: str


PASSED = (
    Lost("test_killed_by_another", rf"rank 2: {SIGKILLED} as asked: world.kill\(2\) in rank 0$"),
    Lost("test_killed_in_a_collective", rf"rank 1: {SIGKILLED} as asked: world.kill\(1\)"),
    Lost("test_killed_by_itself", rf"rank 0: {SIGKILLED} as asked: world.kill\(0\) in rank 0$"),
    Lost("test_killed_by_all", rf"rank 1: {SIGKILLED} as asked: world.kill\(1\) in rank [0-2]$"),
    Lost(
        "test_killed_at_a_function",
        rf"rank 1: {SIGKILLED} as asked: world.kill\(1, at='test_deaths:step'\), entry 3$",
    ),
    Lost(
        "test_killed_at_a_method_in_a_thread",
        rf"rank 2: {SIGKILLED} as asked: .*at='test_deaths:Engine.save'\), entry 1$",
    ),
    Lost("test_killed_at_a_builtin", rf"rank 0: {SIGKILLED} as asked: .*at='os:getpgrp'"),
    Lost(
        "test_paused_to_the_end",
        rf"rank 2: was stopped as asked: world.pause\(2\) in rank 0; then it {SIGKILLED}$",
    ),
    Lost("test_announced[kill]", rf"rank 1: {SIGKILLED} as asked: Fault\(\) on write_data$"),
    Lost("test_announced[stop]", r"rank 1: was stopped as asked: Fault\(\) on write_data; then"),
    Lost("test_announced[exit]", r"rank 1: exited with code 0 as asked: Fault\(\) on write_data$"),
    Lost("test_lost_with_a_child", rf"rank 1: {SIGKILLED} as asked"),
    Lost("test_loses_a_rank", rf"rank 2: {SIGKILLED} as asked"),
)
PASSED_WHOLE = ("test_paused_and_resumed", "test_paused_at_a_function", "test_has_all_ranks_again")
PASSED_WITHOUT_MARKER = (
    "test_worlds_go_on", "test_worlds_pause_and_resume", "test_worlds_without_a_survivor",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failed:
    """A test that fails: its phase, its headline and further text of its report."""

    test: str
    headline: str
    also: str = ""
    phase: str = "call"


FAILED = (
    Failed(
        "test_a_survivor_fails",
        "rank 1: AssertionError: as it should not",
        rf"rank 2: {SIGKILLED} as asked: world.kill\(2\)",
    ),
    Failed(
        "test_announces_and_lives",
        r"rank 1: lives on after its end was asked for: Fault\(\) on write_data$",
    ),
    Failed(
        "test_announces_and_passes",
        r"rank 1: lives on after its end was asked for: Fault\(\) on write_data$",
    ),
    Failed(
        "test_another_dies_unasked",
        "rank 1: exited with code 0 in call, without a verdict",
        rf"rank 2: {SIGKILLED} as asked",
    ),
    Failed(
        "test_all_are_killed", "no rank is left to give a verdict", "rank 1: was killed .*asked"
    ),
    Failed(
        "test_fails_and_is_killed", "rank 1: ValueError: boom", rf"rank 1: {SIGKILLED} as asked"
    ),
    Failed(
        "test_never_reached",
        r"rank 1: Failed: world.kill\(1, at='test_deaths:step'\): entered 1 times, expected 2",
        phase="teardown",
    ),
    Failed(
        "test_paused_while_others_hang",
        "rank 0: still in call at the time limit of 2 s, at ",
        r"rank 2: was stopped as asked: world.pause\(2\) in rank 0",
    ),
    Failed("test_no_such_point[no colon]", "rank 0: ValueError: a point is written"),
    Failed(
        "test_no_such_point[test_deaths:setp]", "rank 0: ValueError: .*has no 'setp'; there .*step"
    ),
    Failed("test_no_such_point[test_deaths:FOREVER_S]", "rank 0: ValueError: .*is no function"),
    Failed(
        "test_kill_of_no_rank", r"ranks 0-2: ValueError: kill\(\): rank must be from 0 to 2, got 3"
    ),
)


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    """The session that ran every case."""
    files = {"test_deaths.py": "deaths.py", "test_deaths_in_worlds.py": "deaths_in_worlds.py"}
    return make_suite(files, ini="dcp_grace = 0.5").run()


@pytest.mark.parametrize("case", PASSED, ids=lambda case: case.test)
def test_a_death_that_was_asked_for_is_reported_and_is_no_failure(
    session: SessionResult, case: Lost
) -> None:
    assert session.outcomes(case.test) == {"call": "passed"}
    (text,) = [t for name, t in lost_sections(session, case.test)]
    assert re.match(case.line, text)


def lost_sections(session: SessionResult, test: str) -> list[tuple[str, str]]:
    sections = session.phases(test)["teardown"].sections
    return [(name, text) for name, text in sections if "lost as asked" in name]


@pytest.mark.parametrize("test", PASSED_WHOLE)
def test_a_rank_that_goes_on_or_is_replaced_is_not_lost(session: SessionResult, test: str) -> None:
    assert session.outcomes(test) == {"call": "passed"}
    assert lost_sections(session, test) == []


@pytest.mark.parametrize("test", PASSED_WITHOUT_MARKER)
def test_worlds_of_a_test_s_own_go_on_without_the_ranks_it_kills(
    session: SessionResult, test: str
) -> None:
    assert session.outcomes(test) == {"call": "passed"}


@pytest.mark.parametrize("case", FAILED, ids=lambda case: case.test)
def test_nothing_else_is_forgiven(session: SessionResult, case: Failed) -> None:
    report = session.bad(case.test)
    category = "error" if case.phase == "teardown" else "failed"
    assert session.outcomes(case.test)[case.phase] == category
    assert re.match(case.headline, report.headline)
    assert re.search(case.also, report.text)


def test_a_started_run_without_a_look_at_its_result_fails_when_the_block_ends(
    session: SessionResult,
) -> None:
    test = "test_worlds_without_a_look_at_the_result"
    assert session.outcomes(test) == {"call": "failed"}
    said = r"WorldError: ranks 0-1: ValueError: invalid literal .* \(int in a world of 2\)"
    assert re.search(said, session.bad(test).text)


def test_survivors_are_torn_down(session: SessionResult) -> None:
    torn = [n["rank"] for n in session.noted("torn down") if n["test"] == "test_killed_by_another"]
    assert sorted(torn) == [0, 1]


def test_every_case_is_looked_at_here(session: SessionResult) -> None:
    looked_at = {case.test for case in (*PASSED, *FAILED)} | {*PASSED_WHOLE}
    looked_at |= {*PASSED_WITHOUT_MARKER, "test_worlds_without_a_look_at_the_result"}
    assert {nodeid.rpartition("::")[2] for nodeid in session.collected} == looked_at


def test_no_warning_is_given_and_nothing_is_left(session: SessionResult) -> None:
    assert session.warnings == ()
    assert session.repeated() == []
    assert session.left_running == ()
    assert session.left_in_tmpdir == ()


@pytest.mark.parametrize("option", ["--dcp-launch=spawn", "-n2"])
def test_it_is_the_same_with_spawned_ranks_and_in_workers(
    make_suite: MakeSuite, option: str
) -> None:
    some = (
        "test_killed_at_a_function", "test_paused_to_the_end", "test_worlds_pause_and_resume",
        "test_another_dies_unasked",
    )  # fmt: skip
    files = {"test_deaths.py": "deaths.py", "test_deaths_in_worlds.py": "deaths_in_worlds.py"}
    suite = make_suite(files, ini="dcp_grace = 0.5")
    session = suite.run(option, "-k", " or ".join(some))
    for test in some[:-1]:
        assert session.outcomes(test) == {"call": "passed"}
    for case in (case for case in PASSED if case.test in some):
        ((_, text),) = lost_sections(session, case.test)
        assert re.match(case.line, text)
    assert "rank 1: exited with code 0 in call" in session.bad(some[-1]).text
    assert session.left_running == ()
