"""A faulty rank fails its test in time, under its number, and leaves nothing behind.

One session runs all the cases of `samples/`. Cases that end the session are in
`test_session_endings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

GRACE_S = 0.5
LIMIT_S = 3.0
"""timeout= of samples/hangs.py; that of the others is ten times as long."""
MARGIN_S = 4.0
"""For taking stacks, killing and reaping on a machine that does other work too."""

FAILED = {"call": "failed"}
PASSED = {"call": "passed"}
SETUP_ERROR = {"setup": "error"}
TEARDOWN_ERROR = {"call": "passed", "teardown": "error"}


@dataclass(frozen=True, slots=True)
class Case:
    """A test of the sample and what must come of it."""

    test: str
    outcomes: Mapping[str, str]
    """Phase -> category, all that the terminal counts."""
    headline: str = ""
    """A pattern at the start of the first line of its failure."""


FAULTS = (
    Case("test_one_rank_raises", FAILED, "rank 1: ValueError: boom$"),
    Case("test_one_rank_asserts", FAILED, "rank 2: AssertionError: assert 2 != 2$"),
    Case("test_all_ranks_assert", FAILED, "ranks 0-3: AssertionError: assert 1 == 2"),
    Case("test_pytest_fail", FAILED, "rank 3: Failed: explicit$"),
    Case("test_sys_exit", FAILED, "rank 1: SystemExit: 0$"),
    Case("test_unpicklable_exception", FAILED, "rank 1: Unpicklable: has a lock$"),
    Case("test_unprintable_exception", FAILED, "rank 1: Unprintable: .*__str__ raised TypeError"),
    Case("test_exception_that_is_no_exception", FAILED, "rank 1: Unusual: not an Exception$"),
    Case("test_raises_in_setup", SETUP_ERROR, "rank 1: ValueError: in setup$"),
    Case("test_unknown_fixture", SETUP_ERROR, "ranks 0-3: .*no_such_fixture"),
    Case("test_exits_in_setup", SETUP_ERROR, "rank 1: exited with code 0 in setup"),
    Case("test_raises_in_teardown", TEARDOWN_ERROR, "rank 2: ValueError: in teardown$"),
    Case("test_exits_in_teardown", TEARDOWN_ERROR, "rank 2: exited with code 0 in teardown"),
    Case(
        "test_raises_in_call_and_teardown",
        {"call": "failed", "teardown": "error"},
        "rank 2: ValueError: in teardown$",
    ),
    Case("test_os_exit_0", FAILED, "rank 1: exited with code 0 in call"),
    Case("test_os_exit_3", FAILED, "rank 1: exited with code 3 in call"),
    Case("test_all_ranks_exit", FAILED, "ranks 0-3: exited with code 0 in call"),
    Case("test_sigkill", FAILED, r"rank 1: was killed by signal 9 \(SIGKILL\) in call"),
    Case("test_segfault", FAILED, r"rank 1: was killed by signal 11 \(SIGSEGV\) in call"),
    Case("test_becomes_another_program", FAILED, "rank 1: exited with code 0 in call"),
    Case("test_exits_between_phases", TEARDOWN_ERROR, "rank 1: exited with code 3"),
    Case(
        "test_exits_with_code_3_after_its_verdict",
        TEARDOWN_ERROR,
        "rank 1: exited with code 3 after its verdict$",
    ),
    Case(
        "test_dies_after_its_verdict",
        TEARDOWN_ERROR,
        r"rank 1: was killed by signal 9 \(SIGKILL\) after its verdict$",
    ),
    Case("test_goes_on_in_a_child", FAILED, "rank 1: exited with code 0 in call"),
    Case("test_leaks_a_process_and_fails", FAILED, "rank 1: ValueError: boom$"),
    Case("test_prints_without_end", FAILED, "rank 1: printed [0-9]+ bytes in call, more than"),
    Case("test_closes_its_report_socket", FAILED, "rank 1: closed its report socket in call"),
    Case(
        "test_writes_nonsense_to_its_report_socket",
        FAILED,
        "rank 1: data on its report socket in call is refused: not the beginning of a message",
    ),
    Case(
        "test_barrier_that_a_rank_leaves_out",
        FAILED,
        r"ranks? [1-3].*exchange cannot complete .*: rank 0 \(ended call\) will not come$",
    ),
    Case("test_barrier_that_a_rank_dies_before", FAILED, "rank 0: exited with code 0 in call"),
    Case(
        "test_mismatched_meetings",
        FAILED,
        r"ranks? .*asked the world for different things \(.*rank 0: barrier\(\), .*gather\(\)",
    ),
)

HANGS = (
    Case(
        "test_collective_that_one_rank_leaves_out",
        FAILED,
        "ranks 0,2-3: still in call at the time limit of 3 s, in all_reduce, at ",
    ),
    Case(
        "test_mismatched_collectives",
        FAILED,
        r"ranks wait in different collectives \(rank 0: broadcast, ranks 1-3: all_reduce\)",
    ),
    Case("test_busy_loop", FAILED, "rank 2: still in call at the time limit of 3 s, at "),
    Case("test_sleep", FAILED, "rank 3: still in call at the time limit of 3 s, at "),
    Case("test_stopped_process", FAILED, "rank 1: still in call at the time limit .*stopped"),
    Case("test_setup", SETUP_ERROR, "rank 1: still in setup at the time limit of 3 s, at "),
    Case("test_teardown", TEARDOWN_ERROR, "rank 2: still in teardown at the time limit of 3 s"),
)

HARMLESS = (
    Case("test_child_that_returns", PASSED),
    Case("test_leaks_a_thread", PASSED),
    Case("test_leaks_a_grandchild", PASSED),
    Case("test_leaks_a_daemon", PASSED),
    Case("test_leaks_a_process_without_environment", PASSED),
    Case("test_passes_in_the_end", PASSED),
    Case("test_skipif_false", PASSED),
    Case("test_after_unknown_fixture", PASSED),
)

SKIPPED = (
    Case("test_all_skip", {"call": "skipped"}, "Skipped: all of us$"),
    Case("test_all_skip_in_setup", {"setup": "skipped"}, "Skipped: from the fixture$"),
    Case("test_skip_mark", {"setup": "skipped"}, "Skipped: by mark$"),
    Case("test_skipif_true", {"setup": "skipped"}, "Skipped: by condition$"),
)

NOT_SKIPPED = (
    Case("test_one_skips", FAILED, r"rank 0 skipped \(.*just me\), but ranks 1-3 passed"),
    Case("test_one_passes", FAILED, r"ranks 0-1,3 skipped \(.*not me\), but rank 2 passed"),
    Case("test_one_skips_one_fails", FAILED, "rank 1: ValueError: boom$"),
    Case(
        "test_one_skips_in_setup",
        SETUP_ERROR,
        r"rank 1 skipped \(.*from the fixture\), but ranks 0,2-3 passed",
    ),
)

XFAILED = (
    ("test_all_xfail", "known"),
    ("test_xfail_mark", "known"),
    ("test_xfail_mark_one_dies", "known"),
    ("test_xfail_raises_right", ""),
    ("test_xfail_raises_right_and_the_others_are_reported", ""),
    ("test_xfail_mark_added", "known since now"),
)

NOT_XFAILED = (
    Case("test_one_xfails", FAILED, r"rank 0 xfailed \(known\), but ranks 1-3 passed: "),
    Case(
        "test_xfail_mark_added_by_one_which_fails",
        FAILED,
        r"rank 0 xfailed \(known to me\), but ranks 1-3 passed: ",
    ),
    Case("test_one_xfails_one_fails", FAILED, "rank 1: ValueError: boom$"),
    Case("test_one_xfails_one_dies", FAILED, "rank 1: exited with code 0 in call"),
    Case("test_one_xfails_one_skips", FAILED, r"rank 1 skipped \(.*just me\), but ranks 0,2-3"),
    Case("test_xfail_raises_wrong", FAILED, "rank 2: KeyError: 'x'$"),
    Case("test_xfail_raises_one_dies", FAILED, "rank 2: exited with code 0 in call"),
    Case("test_xfail_raises_right_then_wrong", FAILED, "rank 0: KeyError: 'x'$"),
    Case("test_xfail_raises_right_then_one_dies", FAILED, "rank 0: was killed by signal 9"),
    Case("test_xfail_raises_right_but_one_hangs", FAILED, "rank 0: still in call, at "),
    Case("test_xfail_raises_right_but_some_wait", FAILED, "ranks 0-1,3: still in call, in all_red"),
    Case("test_xfail_condition_false", FAILED, "rank 1: AssertionError: assert 1 != 1$"),
    Case("test_xfail_mark_added_by_one_another_fails", FAILED, "rank 1: ValueError: not known$"),
    Case("test_xpass_strict", FAILED, r"\[XPASS\(strict\)\] known$"),
    Case(
        "test_xfail_mark_added_strictly_and_passes",
        FAILED,
        r".*\[XPASS\(strict\)\] known since now$",
    ),
)

XPASSED = (
    "test_xpass",
    "test_xfail_mark_added_and_passes",
    "test_xfail_mark_added_without_reason_and_passes",
)


def name_of(case: object) -> str:
    return case.test if isinstance(case, Case) else str(case)


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=name_of)


def duration_s(session: SessionResult, test: str) -> float:
    """From the start of the phase that failed; the setup of a first test starts the zygote too."""
    phases = session.phases(test).values()
    failed = [report.when for report in phases if report.category not in ("", "passed")]
    return sum(r.duration_s for r in phases if r.when != "setup" or "setup" in failed)


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    """The session that ran all cases, except the cases that end it."""
    suite = make_suite(
        {
            "test_faults.py": "faults.py",
            "test_hangs.py": "hangs.py",
            "test_verdicts.py": "verdicts.py",
            "conftest.py": "slow_controller.py",
        },
        ini=f"dcp_grace = {GRACE_S}\ndcp_output_limit = 16",
    )
    return suite.run()


# Faults.


@each(FAULTS + HANGS)
def test_a_fault_in_a_rank_fails_the_test_in_its_phase(session: SessionResult, case: Case) -> None:
    assert session.outcomes(case.test) == case.outcomes


@each(FAULTS + HANGS)
def test_the_headline_names_the_rank_and_the_cause(session: SessionResult, case: Case) -> None:
    report = session.bad(case.test)
    assert re.match(case.headline, report.headline)
    assert report.message == report.headline


def test_an_unknown_fixture_is_explained_as_pytest_does(session: SessionResult) -> None:
    text = session.bad("test_unknown_fixture").text
    assert "fixture 'no_such_fixture' not found" in text
    assert "available fixtures: " in text


@each(FAULTS + NOT_SKIPPED + NOT_XFAILED)
def test_peers_of_a_faulty_rank_get_no_more_than_the_grace(
    session: SessionResult, case: Case
) -> None:
    assert duration_s(session, case.test) < GRACE_S + MARGIN_S


@each(HANGS)
def test_a_hang_ends_at_the_time_limit(session: SessionResult, case: Case) -> None:
    from_setup_on = sum(report.duration_s for report in session.phases(case.test).values())
    assert from_setup_on >= LIMIT_S
    assert duration_s(session, case.test) < LIMIT_S + GRACE_S + MARGIN_S


@each(HARMLESS)
def test_a_harmless_test_passes(session: SessionResult, case: Case) -> None:
    assert session.outcomes(case.test) == case.outcomes


@pytest.mark.parametrize(
    ("test", "survivors"),
    [
        ("test_pytest_fail", {0, 1, 2, 3}),
        ("test_becomes_another_program", {0, 2, 3}),
        ("test_exits_between_phases", {0, 2, 3}),
    ],
)
def test_ranks_that_outlive_a_fault_tear_their_fixtures_down(
    session: SessionResult, test: str, survivors: set[int]
) -> None:
    notes = session.folder.glob(f"torn-down-{test}-*")
    assert {int(note.name.rpartition("-")[2]) for note in notes} == survivors


@pytest.mark.parametrize(
    ("test", "who"),
    [
        ("test_leaks_a_grandchild", "rank 1"),
        ("test_leaks_a_daemon", "rank 1"),
        ("test_leaks_a_process_without_environment", "rank [0-3]"),
        ("test_leaks_a_process_and_fails", "rank 1"),
    ],
)
def test_a_process_that_a_rank_left_behind_is_warned_of(
    session: SessionResult, test: str, who: str
) -> None:
    told = [text for text in session.warnings if f"::{test}: " in text]
    assert len(told) == 1
    assert re.match(rf"LeftBehindWarning: .*: {who} left process \d+ \(/bin/sleep 600", told[0])


def test_the_session_warns_of_nothing_else(session: SessionResult) -> None:
    assert {text.partition(":")[0] for text in session.warnings} == {"LeftBehindWarning"}


# Skips and expected failures.


@each(SKIPPED)
def test_a_test_is_skipped_when_every_rank_skips(session: SessionResult, case: Case) -> None:
    report = session.bad(case.test)
    assert session.outcomes(case.test) == case.outcomes
    assert re.match(case.headline, report.text)
    assert report.path.endswith("test_verdicts.py")


@each(NOT_SKIPPED)
def test_a_skip_by_some_ranks_is_a_failure(session: SessionResult, case: Case) -> None:
    assert session.outcomes(case.test) == case.outcomes
    assert re.match(case.headline, session.bad(case.test).headline)


@pytest.mark.parametrize(("test", "reason"), XFAILED)
def test_a_failure_as_expected_is_an_xfail(session: SessionResult, test: str, reason: str) -> None:
    report = session.bad(test)
    assert session.outcomes(test) == {"call": "xfailed"}
    assert report.xfail == reason


@pytest.mark.parametrize(("test", "reason"), XFAILED)
def test_an_xfail_shows_the_test_not_the_controller(
    session: SessionResult, test: str, reason: str
) -> None:
    assert "MarkedItem" not in session.bad(test).text


@each(NOT_XFAILED)
def test_an_xfail_hides_no_other_failure(session: SessionResult, case: Case) -> None:
    report = session.bad(case.test)
    assert session.outcomes(case.test) == case.outcomes
    assert re.match(case.headline, report.text, re.MULTILINE)


@pytest.mark.parametrize("test", XPASSED)
def test_an_unexpected_pass_is_an_xpass(session: SessionResult, test: str) -> None:
    assert session.outcomes(test) == {"call": "xpassed"}


@pytest.mark.parametrize(
    ("test", "category"),
    [
        ("test_xfail_without_run", "xfailed"),
        ("test_skip_mark", "skipped"),
        ("test_skipif_true", "skipped"),
    ],
)
def test_a_test_that_is_not_run_starts_no_world(
    session: SessionResult, test: str, category: str
) -> None:
    zygote = 1
    assert session.outcomes(test) == {"setup": category}
    assert session.phases(test)["setup"].children == zygote
    assert session.phases("test_passes_in_the_end")["setup"].children == zygote + 4


# The session as a whole.


def test_every_test_is_reported_once(session: SessionResult) -> None:
    assert session.repeated() == []
    assert {report.nodeid for report in session.reports} == set(session.collected)


def test_every_test_of_the_samples_is_looked_at_here(session: SessionResult) -> None:
    cases = FAULTS + HANGS + HARMLESS + SKIPPED + NOT_SKIPPED + NOT_XFAILED
    looked_at = {case.test for case in cases} | {test for test, _ in XFAILED} | {*XPASSED}
    looked_at |= {"test_xfail_without_run"}
    assert {nodeid.rpartition("::")[2] for nodeid in session.collected} == looked_at


def test_only_the_controller_reports(session: SessionResult) -> None:
    assert len(session.pids) == 1


def test_a_session_with_failures_exits_with_1(session: SessionResult) -> None:
    assert session.exit_code == pytest.ExitCode.TESTS_FAILED


def test_only_the_zygote_lives_on_after_the_last_test(session: SessionResult) -> None:
    assert session.children == {"loop": 1, "finish": 0}


def test_no_process_outlives_the_session(session: SessionResult) -> None:
    assert session.left_running == ()


def test_nothing_is_forgotten_in_the_temporary_folder(session: SessionResult) -> None:
    assert session.left_in_tmpdir == ()
