"""A test that ends its session, or kills its runner, does not pass and leaves nothing behind.

Each test of `samples/endings.py` runs in a session of its own, before one that would pass.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

GRACE_S = 0.5
LIMIT_S = 60.0
"""timeout= of samples/endings.py; such a session takes less on a busy machine, too."""
STOPPING = ("test_exit", "test_keyboard_interrupt", "test_ctrl_c", "test_controller_killed")
BESIDE_A_FAILURE = {"test_exit_beside_a_failure": 1, "test_interrupt_beside_a_failure": 2}
"""Test -> exit code of the session."""
ENDINGS = (*STOPPING, *BESIDE_A_FAILURE, "test_zygote_killed")


class Endings:
    """Sessions of `samples/endings.py`, each run once."""

    def __init__(self, make_suite: MakeSuite) -> None:
        ini = f"dcp_grace = {GRACE_S}"
        self._suite = make_suite({"test_endings.py": "endings.py"}, ini)
        self._ran: dict[str, SessionResult] = {}

    def after(self, test: str) -> SessionResult:
        """The session in which `test` ran before `test_after`."""
        if test not in self._ran:
            args = (f"test_endings.py::{name}" for name in (test, "test_after"))
            self._ran[test] = self._suite.run(*args)
        return self._ran[test]


@pytest.fixture(scope="module")
def endings(make_suite: MakeSuite) -> Endings:
    return Endings(make_suite)


@pytest.mark.parametrize("test", ENDINGS)
def test_a_session_that_a_rank_ends_leaves_nothing(endings: Endings, test: str) -> None:
    ended = endings.after(test)
    assert ended.left_running == ()
    assert ended.left_in_tmpdir == ()


@pytest.mark.parametrize("test", STOPPING)
def test_a_session_that_a_rank_ends_does_not_wait_for_the_limit(
    endings: Endings, test: str
) -> None:
    assert endings.after(test).elapsed_s < LIMIT_S


@pytest.mark.parametrize("test", STOPPING)
def test_a_session_that_a_rank_ends_has_passed_nothing(endings: Endings, test: str) -> None:
    ended = endings.after(test)
    assert ended.exit_code != pytest.ExitCode.OK
    assert "passed" not in {report.category for report in ended.reports}


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("test_exit", "::test_exit: rank 1: enough"),
        ("test_keyboard_interrupt", "::test_keyboard_interrupt: rank 1: KeyboardInterrupt"),
        ("test_exit_beside_a_failure", "::test_exit_beside_a_failure: rank 1: bye"),
        ("test_interrupt_beside_a_failure", "_a_failure: rank 1: KeyboardInterrupt"),
    ],
)
def test_the_rank_that_stops_the_session_is_named(endings: Endings, test: str, said: str) -> None:
    ended = endings.after(test)
    assert said in ended.output
    assert "test_after" not in {report.nodeid.rpartition("::")[2] for report in ended.reports}


@pytest.mark.parametrize("test", BESIDE_A_FAILURE)
def test_a_failure_beside_a_rank_that_ends_the_session_is_reported(
    endings: Endings, test: str
) -> None:
    ended = endings.after(test)
    report = ended.phases(test)["call"]
    assert report.category == "failed"
    assert report.headline == "rank 0: ValueError: not to be missed"
    assert "\n  rank 1: ended the session: " in report.text
    assert ended.phases(test)["teardown"].category in ("", "passed")
    assert ended.exit_code == BESIDE_A_FAILURE[test]


def test_a_survivor_s_exit_in_teardown_ends_the_session(endings: Endings) -> None:
    ended = endings.after("test_exit_in_a_survivor")
    assert ended.phases("test_exit_in_a_survivor")["call"].category == "failed"
    assert ended.exit_code == 9
    assert "::test_exit_in_a_survivor: rank 1: after all" in ended.output


WORLDS = """
import os, pytest

def end_or_fail():
    if os.environ["RANK"] == "1":
        pytest.exit("bye", returncode=0)
    raise ValueError("not to be missed")

def test_fails(worlds):
    with worlds(2) as w:
        w.run(end_or_fail)

def test_expects_the_failure(worlds):
    with pytest.raises(Exception, match="not to be missed"):
        with worlds(2) as w:
            w.run(end_or_fail)

def test_exits(worlds):
    with worlds(2) as w:
        w.run(lambda: pytest.exit("bye", returncode=7))

def test_after():
    pass
"""


@pytest.mark.parametrize(
    ("test", "category", "exit_code"),
    [("test_fails", "failed", 1), ("test_expects_the_failure", "passed", 1)],
)
def test_a_failure_beside_an_exit_in_a_world_of_the_test_s_own_is_shown(
    make_suite: MakeSuite, test: str, category: str, exit_code: int
) -> None:
    suite = make_suite({"test_worlds.py": WORLDS})
    ended = suite.run(f"test_worlds.py::{test}", "test_worlds.py::test_after")
    assert ended.outcomes(test) == {"call": category}
    assert ended.exit_code == exit_code
    assert "bye" in ended.output
    assert "test_after" not in {report.nodeid.rpartition("::")[2] for report in ended.reports}


def test_an_exit_in_a_world_of_the_test_s_own_keeps_its_return_code(make_suite: MakeSuite) -> None:
    ended = make_suite({"test_worlds.py": WORLDS}).run("test_worlds.py::test_exits")
    assert ended.exit_code == 7


def test_pytest_exit_keeps_its_return_code(endings: Endings) -> None:
    assert endings.after("test_exit").exit_code == 7


@pytest.mark.parametrize("test", ["test_keyboard_interrupt", "test_ctrl_c"])
def test_an_interrupt_exits_with_2(endings: Endings, test: str) -> None:
    assert endings.after(test).exit_code == pytest.ExitCode.INTERRUPTED


def test_a_lost_zygote_fails_the_test_and_says_how_it_ended(endings: Endings) -> None:
    ended = endings.after("test_zygote_killed")
    assert ended.outcomes("test_zygote_killed") == {"call": "failed"}
    assert re.search(
        r"the zygote .*(signal 9|SIGKILL)", ended.phases("test_zygote_killed")["call"].message
    )


def test_after_a_lost_zygote_the_session_goes_on_with_spawned_ranks(endings: Endings) -> None:
    ended = endings.after("test_zygote_killed")
    assert ended.exit_code == pytest.ExitCode.TESTS_FAILED
    assert ended.outcomes("test_after") == {"call": "passed"}
    assert "ranks are spawned from here on" in ended.output
