"""However a session, a worker or the zygote ends, nothing of it goes on; and nothing piles up.

The world that is cut off runs a program in each rank's process group, one in a session of its own,
and a child that is no program, in a session of its own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest

from support.live_session import GONE_S, LiveSession, live

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

PASSED = {"call": "passed"}
FAILED = {"call": "failed"}
INTERRUPTED_S = 15.0
"""Ranks may end their test and tear down; one of these hangs, and is killed 1.5 s after Ctrl-C."""
ENDS_S = 15.0
"""Killing takes some 30 ms, but an interpreter with torch may take seconds to end."""
GROWTH_BYTES = 4 << 20
"""Sixty worlds add some 1.4 MiB to the controller, for their reports, and 8 KiB to the zygote."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A way to end a session from outside."""

    name: str
    act: Callable[[LiveSession], None]
    args: tuple[str, ...]
    exit_code: int


def killing(signum: int) -> Callable[[LiveSession], None]:
    return lambda session: os.kill(session.pid, signum)


INTERRUPTS = (
    Ending("ctrl-c", LiveSession.interrupt, (), 2),
    Ending("ctrl-c-spawned", LiveSession.interrupt, ("--dcp-launch=spawn",), 2),
    Ending("ctrl-c-distributed", LiveSession.interrupt, ("-n2",), 2),
)
KILLS = (
    Ending("sigterm", killing(signal.SIGTERM), (), -signal.SIGTERM),
    Ending("sigkill", killing(signal.SIGKILL), (), -signal.SIGKILL),
    Ending("sigkill-spawned", killing(signal.SIGKILL), ("--dcp-launch=spawn",), -signal.SIGKILL),
    Ending("sigkill-distributed", killing(signal.SIGKILL), ("-n2",), -signal.SIGKILL),
)


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_lasting.py": "lasting.py"}, ini="dcp_grace = 0.5")


@dataclass(frozen=True, slots=True)
class LastingWorld:
    """The processes of the world that lasts, found while it runs."""

    launcher: psutil.Process
    """The parent of its ranks: the zygote, or the controller of spawned ranks."""
    all: list[psutil.Process]
    """The ranks and what they started."""

    @classmethod
    def of(cls, session: LiveSession) -> LastingWorld:
        ranks = [psutil.Process(note["pid"]) for note in session.wait_for_note("lasting", 2)]
        found = [*ranks, *(child for rank in ranks for child in rank.children(recursive=True))]
        assert len(found) == 2 * (1 + 3)
        return cls(ranks[0].parent(), found)


# The session.


@pytest.mark.parametrize("ending", INTERRUPTS + KILLS, ids=lambda ending: ending.name)
def test_nothing_outlives_a_session_that_is_cut_off(suite: Suite, ending: Ending) -> None:
    with live(suite, *ending.args, "test_lasting.py::test_lasts") as session:
        world = LastingWorld.of(session)
        ending.act(session)
        session.wait_until_gone(world.all, INTERRUPTED_S if ending in INTERRUPTS else GONE_S)
        result = session.end(within_s=ENDS_S)
    assert result.exit_code == ending.exit_code
    assert ("KeyboardInterrupt" in result.output) == (ending in INTERRUPTS)
    assert result.left_running == ()
    assert result.left_in_tmpdir == ()


# A worker of xdist.


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda signum: str(signum.name)
)
def test_nothing_outlives_a_worker_that_is_killed(suite: Suite, signum: signal.Signals) -> None:
    with live(suite, "-n2") as session:
        world = LastingWorld.of(session)
        world.launcher.parent().send_signal(signum)
        session.wait_until_gone([*world.all, world.launcher])
        result = session.end()
    assert "crashed while running 'test_lasting.py::test_lasts'" in result.output
    assert {result.outcomes(test)["call"] for test in ("test_after", "test_ordinary_after")} == {
        "passed"
    }
    assert result.left_running == ()


# The zygote.


@dataclass(frozen=True, slots=True)
class LostZygote:
    """A session whose zygote was killed in the middle of a test."""

    pid: int
    result: SessionResult


@pytest.fixture(scope="module")
def lost_zygote(suite: Suite) -> LostZygote:
    with live(suite) as session:
        world = LastingWorld.of(session)
        world.launcher.kill()
        session.wait_until_gone(world.all)
        return LostZygote(world.launcher.pid, session.end())


def test_the_test_that_loses_the_zygote_fails_and_names_it(lost_zygote: LostZygote) -> None:
    result = lost_zygote.result
    assert result.outcomes("test_lasts") == FAILED
    message = result.bad("test_lasts").message
    assert f"the zygote (process {lost_zygote.pid})" in message
    assert "killed by signal 9" in message


def test_worlds_are_spawned_after_the_zygote_is_lost_with_a_warning(
    lost_zygote: LostZygote,
) -> None:
    result = lost_zygote.result
    assert result.outcomes("test_after") == PASSED
    assert result.outcomes("test_ordinary_after") == PASSED
    assert [text for text in result.warnings if "ranks are spawned from here on" in text]


def test_nothing_outlives_a_session_that_lost_its_zygote(lost_zygote: LostZygote) -> None:
    assert lost_zygote.result.left_running == ()
    assert lost_zygote.result.left_in_tmpdir == ()
    assert lost_zygote.result.exit_code == pytest.ExitCode.TESTS_FAILED


# Tests that meddle with child processes.


def test_tests_may_wait_for_any_child(make_suite: MakeSuite) -> None:
    result = make_suite({"test_waits.py": "waits.py"}).run()
    assert {(report.nodeid, report.category) for report in result.reports if report.category} == {
        (nodeid, "passed") for nodeid in result.collected
    }
    assert result.exit_code == pytest.ExitCode.OK
    assert result.left_running == ()


# Many worlds.


@pytest.fixture(scope="module")
def many_worlds(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_many_worlds.py": "many_worlds.py"}).run("-q")


def growth(session: SessionResult, who: str, what: str) -> int:
    """How much more there was after the worlds than before."""
    (before,) = (note for note in session.noted("before") if note["who"] == who)
    (after,) = (note for note in session.noted("after") if note["who"] == who)
    return int(after[what] - before[what])


def test_all_of_many_worlds_do_their_work(many_worlds: SessionResult) -> None:
    categories = [report.category for report in many_worlds.reports if report.category]
    assert sorted({*categories}) == ["passed", "xfailed"]
    assert categories.count("xfailed") == 5


@pytest.mark.parametrize("who", ["controller", "zygote"])
def test_many_worlds_leave_no_descriptor_open(many_worlds: SessionResult, who: str) -> None:
    assert growth(many_worlds, who, "fds") == 0


@pytest.mark.parametrize("who", ["controller", "zygote"])
def test_many_worlds_leave_no_memory_taken(many_worlds: SessionResult, who: str) -> None:
    assert growth(many_worlds, who, "rss_bytes") < GROWTH_BYTES


def test_many_worlds_leave_nothing_in_the_temporary_folder(many_worlds: SessionResult) -> None:
    assert many_worlds.left_in_tmpdir == ()
    assert many_worlds.left_running == ()
