"""A session that is interrupted while a test runs: its ranks tear down, in bounded time."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from support.live_session import LiveSession, live

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

SIGNALS = """
import signal
import pytest

def exit_session(signum, frame):
    pytest.exit("asked to", returncode=9)

def fail(signum, frame):
    pytest.fail("it took too long", pytrace=False)

signal.signal(signal.SIGUSR1, exit_session)
signal.signal(signal.SIGALRM, fail)
"""
EVERY_SCOPE = {"function": 2, "module": 2, "session": 2}
OF_MODULE = "RuntimeError: torn down with the module"
NOTICED_S = 1.0
"""For a first Ctrl-C to be heard before a second; one that comes too early ends the test too."""


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    files = {"test_interrupted.py": "interrupted.py", "conftest.py": SIGNALS}
    return make_suite(files)


def interrupted(
    suite: Suite, test: str, *args: str, act: Callable[[LiveSession], None] = LiveSession.interrupt
) -> SessionResult:
    """The session, which was interrupted when both ranks waited in a test."""
    with live(suite, *args, f"test_interrupted.py::{test}") as session:
        session.wait_for_note("waits", 2)
        act(session)
        return session.end()


def torn_down(session: SessionResult) -> Counter[str]:
    """How often each scope was torn down, over all ranks."""
    return Counter(note["scope"] for note in session.noted("torn down"))


def bad_headlines(session: SessionResult) -> list[tuple[str, str]]:
    """The phase and the headline of each report of a failure."""
    bad = ("failed", "error")
    return [(one.when, one.headline) for one in session.reports if one.category in bad]


@pytest.mark.parametrize(
    ("test", "args"), [("test_sleeps", ()), ("test_property", ("--dcp-launch=spawn",))]
)
def test_ranks_of_a_test_that_is_interrupted_tear_every_scope_down(
    suite: Suite, test: str, args: tuple[str, ...]
) -> None:
    session = interrupted(suite, test, *args)
    assert len(session.noted("went on")) == 2
    assert torn_down(session) == EVERY_SCOPE
    assert bad_headlines(session) == [("teardown", f"ranks 0-1: {OF_MODULE}")]
    assert session.exit_code == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in session.output
    assert session.left_running == ()


def test_a_rank_that_does_not_hear_an_interrupt_is_killed_and_named(suite: Suite) -> None:
    session = interrupted(suite, "test_hangs", act=lambda live: os.kill(live.pid, signal.SIGUSR1))
    assert torn_down(session) == dict.fromkeys(EVERY_SCOPE, 1)
    (in_call, hung), in_teardown = bad_headlines(session)
    assert in_call == "call"
    assert hung.startswith("rank 1: still in call ")
    assert " s after it was interrupted, in all_reduce, at " in hung
    assert in_teardown == ("teardown", f"rank 0: {OF_MODULE}")
    assert session.exit_code == 9
    assert session.left_running == ()


def test_a_second_interrupt_kills_at_once(suite: Suite) -> None:
    def interrupt_twice(session: LiveSession) -> None:
        session.interrupt()
        time.sleep(NOTICED_S)
        session.interrupt()

    session = interrupted(suite, "test_lasts_in_teardown", act=interrupt_twice)
    assert torn_down(session) == {}
    # Nothing was waited for, and so nothing is said of ranks that went on for too long.
    assert bad_headlines(session) == []
    assert session.exit_code == pytest.ExitCode.INTERRUPTED
    assert session.left_running == ()


def test_a_rank_that_exits_the_session_lets_every_rank_tear_down(suite: Suite) -> None:
    session = suite.run("test_interrupted.py::test_exits_in_a_rank")
    assert torn_down(session) == EVERY_SCOPE
    assert bad_headlines(session) == [("teardown", f"ranks 0-1: {OF_MODULE}")]
    assert session.exit_code == 7


def test_a_timer_of_this_process_ends_a_test_whose_ranks_tear_down(suite: Suite) -> None:
    tests = ("test_takes_too_long", "test_functions_take_too_long", "test_after")
    session = suite.run(*(f"test_interrupted.py::{test}" for test in tests))
    assert session.outcomes("test_takes_too_long") == {"call": "failed", "teardown": "error"}
    assert session.outcomes("test_functions_take_too_long") == {"call": "failed"}
    assert len(session.noted("went on")) == 2  # one rank waited for the other
    assert torn_down(session) == {"function": 2, "module": 2, "session": 4}
    assert len(session.noted("after")) == 2
    assert session.exit_code == pytest.ExitCode.TESTS_FAILED
