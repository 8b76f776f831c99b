"""The debugger in a rank: one rank has the terminal, all clocks stand still, the session goes on.

Each dialogue is held once, at a pseudo-terminal of its own, and looked at by several tests.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from support.live_session import live

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

PASSED = {"call": "passed"}
FAILED = {"call": "failed"}
RANKS = {0, 1, 2}
LONGER_THAN_THE_LIMIT_S = 5.0
"""timeout= of the test that is stopped in samples/debugged.py is 2 s."""
QUIT = "Exit: .*rank 1.*: Quitting debugger"


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_debugged.py": "debugged.py"}, ini="dcp_grace = 0.5")


def chosen(*names: str) -> tuple[str, ...]:
    return tuple(f"test_debugged.py::{name}" for name in names)


def line_of(suite: Suite, text: str) -> int:
    lines = (suite.folder / "test_debugged.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


# breakpoint().


@dataclass(frozen=True, slots=True)
class Stop:
    """Observations while a rank was stopped at a breakpoint."""

    shown: str
    """On the terminal, up to the prompt."""
    rank: int
    """The one that answered at the prompt."""
    went_on: set[int]
    """Ranks that were past the breakpoint meanwhile."""
    groups: dict[int, int]
    """Process group of each rank, and -1 for the controller."""
    pids: dict[int, int]
    """Likewise the process ids."""
    result: SessionResult


@pytest.fixture(scope="module")
def stop(suite: Suite) -> Stop:
    with live(suite, *chosen("test_breakpoint", "test_ordinary")) as session:
        shown = session.prompt()
        rank = int(session.ask("p rank"))
        went_on = session.wait_for_note("behind", 2)
        pids = {note["rank"]: note["pid"] for note in session.notes("before")} | {-1: session.pid}
        groups = {one: os.getpgid(pid) for one, pid in pids.items()}
        time.sleep(LONGER_THAN_THE_LIMIT_S)
        session.tell("c")
        result = session.end()
    return Stop(shown, rank, {note["rank"] for note in went_on}, groups, pids, result)


def test_a_breakpoint_stops_the_first_rank_that_meets_it_and_no_other(stop: Stop) -> None:
    assert stop.shown.count("PDB set_trace") == 1
    assert stop.went_on == RANKS - {stop.rank}


def test_the_heading_names_the_rank_that_has_the_terminal(stop: Stop) -> None:
    assert f"> rank {stop.rank} of {len(RANKS)} has the terminal >" in stop.shown


def test_the_clocks_stand_still_while_a_rank_is_stopped(stop: Stop) -> None:
    assert stop.result.outcomes("test_breakpoint") == PASSED
    assert {note["rank"] for note in stop.result.noted("after")} == RANKS
    assert stop.result.exit_code == pytest.ExitCode.OK


def test_only_the_stopped_rank_is_in_the_group_that_may_read_the_terminal(stop: Stop) -> None:
    foreground = stop.groups[-1]
    assert foreground == stop.pids[-1]
    assert {rank for rank, group in stop.groups.items() if group == foreground} == {-1, stop.rank}


def test_every_rank_leads_its_own_group_again_afterwards(stop: Stop) -> None:
    after = {note["rank"]: note["group"] for note in stop.result.noted("after")}
    assert after == {rank: stop.pids[rank] for rank in RANKS}


def test_output_after_the_debugger_is_captured_again(stop: Stop) -> None:
    assert "is done" not in stop.result.output


def test_quit_at_a_breakpoint_ends_the_session(suite: Suite) -> None:
    with live(suite, *chosen("test_stops_and_fails", "test_ordinary")) as session:
        session.prompt()
        session.tell("q")
        session.shown_until(QUIT)
        result = session.end()
    assert result.exit_code == pytest.ExitCode.INTERRUPTED
    assert "test_ordinary" not in {report.nodeid.rpartition("::")[2] for report in result.reports}
    assert result.left_running == ()


@dataclass(frozen=True, slots=True)
class Interruption:
    """A breakpoint in a function, one in a test that then hangs, and Ctrl-C."""

    shown: str
    """On the terminal, up to the first prompt."""
    rank: str
    """The variable RANK at the first prompt."""
    result: SessionResult


@pytest.fixture(scope="module")
def interruption(suite: Suite) -> Interruption:
    args = chosen("test_function", "test_stops_and_hangs", "test_ordinary")
    with live(suite, *args, "--dcp-pdb-rank=1") as session:
        shown = session.prompt()
        rank = session.ask("p os.environ['RANK']")
        session.ask("c")
        session.tell("c")
        session.wait_for_note("hangs", 2)
        session.interrupt()
        return Interruption(shown, rank, session.end())


def test_a_breakpoint_in_a_function_of_a_world_stops_one_rank(interruption: Interruption) -> None:
    assert interruption.shown.count("PDB set_trace") == 1
    assert interruption.rank == "'1'"
    assert interruption.result.outcomes("test_function") == PASSED


def test_ctrl_c_ends_the_session_again_once_the_debugger_is_left(
    interruption: Interruption,
) -> None:
    result = interruption.result
    assert result.exit_code == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in result.output
    assert result.left_running == ()


# A pinned rank, without capture.


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk through a test in the pinned rank."""

    rank: int
    interrupted: str
    """The answer to a command that was interrupted."""
    stepped: str
    """Where it stood after the step over a barrier."""
    stopped_again: str
    """Where it stood at a later breakpoint."""
    result: SessionResult


@pytest.fixture(scope="module")
def walk(suite: Suite) -> Walk:
    with live(suite, "-s", "--dcp-pdb-rank=2", *chosen("test_breakpoint")) as session:
        session.prompt()
        rank = int(session.ask("p rank"))
        session.tell("time.sleep(600)")
        time.sleep(1.0)
        session.interrupt()
        interrupted = session.prompt()
        session.ask("n")
        stepped = session.ask("n")
        session.ask(f"b {line_of(suite, 'is done')}")
        stopped_again = session.ask("c")
        session.tell("c")
        result = session.end()
    return Walk(rank, interrupted, stepped, stopped_again, result)


def test_the_terminal_can_be_pinned_to_a_rank(walk: Walk) -> None:
    assert walk.rank == 2


def test_ctrl_c_at_the_prompt_interrupts_the_command_and_not_the_session(walk: Walk) -> None:
    assert "KeyboardInterrupt" in walk.interrupted
    assert walk.result.exit_code == pytest.ExitCode.OK


def test_the_debugger_can_step_over_a_barrier_of_the_world(walk: Walk, suite: Suite) -> None:
    assert f"({line_of(suite, 'os.getpgrp()')})test_breakpoint" in walk.stepped


def test_the_debugger_stops_again_at_a_breakpoint_that_was_set_in_it(
    walk: Walk, suite: Suite
) -> None:
    assert f"({line_of(suite, 'is done')})test_breakpoint" in walk.stopped_again
    assert walk.result.outcomes("test_breakpoint") == PASSED


def test_without_capture_the_ranks_print_on_the_terminal(walk: Walk) -> None:
    assert {rank for rank in RANKS if f"rank {rank} is done" in walk.result.output} == RANKS


# --pdb.


@dataclass(frozen=True, slots=True)
class PostMortem:
    """A post mortem that was left with `continue`."""

    shown: str
    """On the terminal, up to the prompt."""
    value: str
    """Of a local variable of the failing rank."""
    prompted_again: bool
    result: SessionResult


@pytest.fixture(scope="module")
def post_mortem(suite: Suite) -> PostMortem:
    args = chosen("test_xfails", "test_fails", "test_passes", "test_ordinary")
    with live(suite, "--pdb", *args) as session:
        shown = session.prompt()
        value = session.ask("p value")
        session.tell("c")
        if prompted_again := session.prompts_again():
            session.tell("c")
        result = session.end()
    return PostMortem(shown, value, prompted_again, result)


def test_post_mortem_is_held_in_the_rank_that_failed(post_mortem: PostMortem) -> None:
    assert post_mortem.value == "201"
    assert post_mortem.shown.count("assert 201 == 200") == 1


def test_post_mortem_is_not_held_again_in_the_controller(post_mortem: PostMortem) -> None:
    assert not post_mortem.prompted_again


def test_an_expected_failure_gets_no_post_mortem(post_mortem: PostMortem) -> None:
    assert post_mortem.result.outcomes("test_xfails") == {"call": "xfailed"}
    assert "test_xfails" not in post_mortem.shown


def test_the_session_goes_on_after_a_post_mortem(post_mortem: PostMortem) -> None:
    assert post_mortem.result.outcomes("test_fails") == FAILED
    assert post_mortem.result.outcomes("test_passes") == PASSED
    assert post_mortem.result.outcomes("test_ordinary") == PASSED


def test_quit_in_post_mortem_ends_the_session(suite: Suite) -> None:
    with live(suite, "--pdb", *chosen("test_fails", "test_ordinary")) as session:
        session.prompt()
        session.tell("q")
        session.shown_until(QUIT)
        result = session.end()
    assert result.exit_code == pytest.ExitCode.INTERRUPTED
    assert "test_ordinary" not in {report.nodeid.rpartition("::")[2] for report in result.reports}
    assert result.left_running == ()


# --trace.


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace of three tests: left with `continue`, stepped to the end, and not in a world."""

    first_line: str
    second_line: str
    value: str
    """Of a local variable, on the second line."""
    end: str
    """Where the second test stood after its only line."""
    ordinary: str
    """On the terminal before the prompt in the third."""
    result: SessionResult


@pytest.fixture(scope="module")
def trace(suite: Suite) -> Trace:
    args = chosen("test_fails", "test_passes", "test_ordinary")
    with live(suite, "--trace", "--dcp-pdb-rank=0", *args) as session:
        first_line = session.prompt()
        second_line = session.ask("n")
        value = session.ask("p value")
        session.ask("c")
        end = session.ask("n")
        ordinary = session.ask("n")
        session.tell("c")
        return Trace(first_line, second_line, value, end, ordinary, session.end())


def test_trace_stops_one_rank_at_the_first_line_of_a_test(trace: Trace) -> None:
    assert "value = 200 + rank" in trace.first_line
    assert "assert value == 200" in trace.second_line
    assert trace.value == "200"
    assert trace.result.outcomes("test_fails") == FAILED


def test_a_test_can_be_stepped_through_to_its_end(trace: Trace) -> None:
    assert "--Return--" in trace.end
    assert trace.result.outcomes("test_passes") == PASSED


def test_trace_stops_in_ordinary_tests_too(trace: Trace) -> None:
    assert "test_ordinary()" in trace.ordinary
    assert trace.result.outcomes("test_ordinary") == PASSED


# Elsewhere.


def test_a_spawned_rank_gets_the_terminal_too(suite: Suite) -> None:
    args = ("--dcp-launch=spawn", "--pdb", *chosen("test_stops_and_fails", "test_ordinary"))
    with live(suite, *args) as session:
        session.prompt()
        assert session.ask("p rank") == "1"
        assert "assert 301 == 300" in session.ask("c")
        assert session.ask("p value") == "301"
        session.tell("q")
        session.shown_until(QUIT)
        result = session.end()
    assert result.left_running == ()


def test_a_breakpoint_under_xdist_fails_the_test_and_says_what_to_do(suite: Suite) -> None:
    result = suite.run("-n2", *chosen("test_stops_and_fails", "test_ordinary"))
    assert result.outcomes("test_stops_and_fails") == FAILED
    assert result.outcomes("test_ordinary") == PASSED
    assert re.match("rank 1: .*run with -n0", result.bad("test_stops_and_fails").message)
