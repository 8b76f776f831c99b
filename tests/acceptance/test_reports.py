"""The reports of a session with worlds: one per test, the first cause on top.

One session runs the tests of `samples/reports.py`, whose reports are read closely; short ones run
`samples/selection.py` under options of pytest and of the plugin.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, Report, SessionResult, Suite

INI = "dcp_grace = 1.5\njunit_family = xunit1"
LATER = r"(\d+\.\d\d) s later"
RERUN_TITLE = "to rerun just this"
TABLE_TITLE = "stacks of the ranks that did not end"


def call_of(session: SessionResult, test: str) -> Report:
    return session.phases(test)["call"]


def section_of(text: str, title: str) -> str:
    """The section under a title such as `----- title -----` in a failure's text."""
    match = re.search(
        rf"^-+ {re.escape(title)} -+\n(.*?)(?=^-{{3,}} .* -{{3,}}$|\Z)", text, re.S | re.M
    )
    assert match is not None, f"no section {title!r} in:\n{text}"
    return match[1]


def rerun_args(report: Report) -> list[str]:
    """The arguments of pytest in the line that a failure ends with."""
    program, *args = shlex.split(section_of(report.text, RERUN_TITLE))
    assert program == "pytest"
    return args


def captured(report: Report, stream: str) -> dict[str, str]:
    """Title -> text of a report's sections of one stream."""
    return {title: text for title, text in report.sections if f" {stream} [" in title}


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    """The session over `samples/reports.py`, its reports as they are by default."""
    suite = make_suite({"test_reports.py": "reports.py"}, INI)
    return suite.run("-v", "--junitxml=junit.xml", "--durations=0")


@pytest.fixture(scope="module")
def junit(session: SessionResult) -> list[ElementTree.Element]:
    """The testcases of its JUnit file."""
    return ElementTree.parse(session.folder / "junit.xml").getroot().findall(".//testcase")


# The failure itself.


def test_a_failure_shows_the_ranks_own_traceback_and_assertion(session: SessionResult) -> None:
    text = call_of(session, "test_cause_and_waiting_peers").text
    assert '>       assert loss_of(rank) == 0, f"loss on {rank}"\n' in text
    assert "E       assert 7 == 0\nE        +  where 7 = loss_of(2)\n" in text
    assert re.search(r"^test_reports\.py:\d+: AssertionError$", text, re.M)


def test_the_traceback_shows_no_frame_of_the_harness(session: SessionResult) -> None:
    text = call_of(session, "test_cause_and_waiting_peers").text
    assert "pytest_dcp" not in text.partition(TABLE_TITLE)[0]


def test_waiting_peers_are_one_line_with_the_time(session: SessionResult) -> None:
    lines = call_of(session, "test_cause_and_waiting_peers").text.splitlines()
    assert lines[0].startswith("rank 2: AssertionError: loss on 2")
    line = re.fullmatch(
        rf"  ranks 0-1,3: still in call, in all_reduce, at test_reports\.py:\d+ in "
        rf"test_cause_and_waiting_peers, {LATER}; killed",
        lines[1],
    )
    assert line is not None
    assert float(line[1]) >= 1.5
    assert lines[2] == ""


def test_the_first_cause_comes_before_a_later_failure(session: SessionResult) -> None:
    text = call_of(session, "test_cause_and_later_failure").text
    cause, separator, later = text.partition("rank 3 also failed")
    assert separator
    assert "E           ValueError: the cause" in cause
    assert "E           KeyError: 'later'" not in cause
    assert "E           KeyError: 'later'" in later


def test_a_later_failure_is_one_line_under_the_headline(session: SessionResult) -> None:
    lines = call_of(session, "test_cause_and_later_failure").text.splitlines()
    assert lines[0] == "rank 1: ValueError: the cause"
    line = re.fullmatch(rf"  rank 3: KeyError: 'later', {LATER}", lines[1])
    assert line is not None
    assert float(line[1]) >= 0.2
    assert lines[2] == ""


def test_equal_failures_are_shown_once(session: SessionResult) -> None:
    report = call_of(session, "test_all_fail_alike")
    assert report.headline.startswith("ranks 0-3: AssertionError: assert 2 == 3")
    assert report.text.count("E       assert 2 == 3\n") == 1
    assert report.text.count("assert 2 == 3\n") == 2, "the heading's and the traceback's"


def test_the_short_summary_names_the_rank_and_the_cause(session: SessionResult) -> None:
    line = "FAILED test_reports.py::test_cause_and_later_failure - rank 1: ValueError: the cause"
    assert session.output.splitlines().count(line) == 1


# Captured output.


def test_output_that_differs_is_one_section_per_rank(session: SessionResult) -> None:
    report = call_of(session, "test_output_of_every_kind")
    assert captured(report, "stdout") == {
        f"Captured stdout [rank {rank}] call": f"stdout of {rank}\n" for rank in range(4)
    }


def test_equal_output_is_one_section_for_all(session: SessionResult) -> None:
    report = call_of(session, "test_output_of_every_kind")
    assert captured(report, "stderr") == {"Captured stderr [ranks 0-3] call": "stderr of all\n"}


def test_log_records_have_a_section_of_their_own(session: SessionResult) -> None:
    logs = captured(call_of(session, "test_output_of_every_kind"), "log")
    assert list(logs) == ["Captured log [ranks 0-3] call"]
    assert "logged by all" in logs["Captured log [ranks 0-3] call"]


def test_caplog_works_in_a_rank(session: SessionResult) -> None:
    assert session.outcomes("test_caplog") == {"call": "passed"}


def test_output_of_fixtures_is_distinguished_by_phase(session: SessionResult) -> None:
    report = session.phases("test_output_of_fixtures")["teardown"]
    assert captured(report, "stdout") == {
        "Captured stdout [ranks 0-3] setup": "printed in setup\n",
        "Captured stdout [ranks 0-3] teardown": "printed in teardown\n",
    }


def test_output_of_a_rank_before_its_death_is_shown(session: SessionResult) -> None:
    report = call_of(session, "test_last_words")
    assert captured(report, "stdout")["Captured stdout [rank 1] call"] == "last words of 1\n"


# Hangs.


@pytest.mark.parametrize(
    ("rank", "where"),
    [(0, "in all_reduce, "), (1, "in barrier, "), (2, ""), (3, "in the world's exchange, ")],
)
def test_the_table_of_a_hang_shows_where_each_rank_was(
    session: SessionResult, rank: int, where: str
) -> None:
    table = section_of(call_of(session, "test_hang").text, TABLE_TITLE)
    assert re.search(rf"^rank {rank}: {where}at test_reports\.py:\d+ in test_hang$", table, re.M)


@pytest.mark.parametrize("rank", range(4))
def test_the_table_of_a_hang_has_each_ranks_stack(session: SessionResult, rank: int) -> None:
    table = section_of(call_of(session, "test_hang").text, TABLE_TITLE)
    rows = re.split(r"^(?=rank \d: )", table, flags=re.M)
    stack = next(row for row in rows if row.startswith(f"rank {rank}: "))
    assert re.search(r'^  File "test_reports\.py", line \d+ in test_hang$', stack, re.M)
    assert "_pytest" not in stack


# Reported once for all ranks.


def test_a_warning_of_all_ranks_is_shown_once(session: SessionResult) -> None:
    assert session.warnings == ("UserWarning: told by all ranks",)
    assert session.output.count("UserWarning: told by all ranks") == 1


def test_properties_are_merged_where_they_agree(session: SessionResult) -> None:
    properties = call_of(session, "test_properties").properties
    own = tuple((f"own [rank {rank}]", rank) for rank in range(4))
    assert properties == (("same", "on all"), *own)


def test_a_subtest_is_reported_once_for_all_ranks(session: SessionResult) -> None:
    subtests = [report for report in session.reports if report.subtest]
    assert [report.category for report in subtests] == [
        "subtests passed",
        "subtests passed",
        "failed",
    ]
    assert subtests[2].message.startswith("ranks 1-2: assert not ")
    assert session.output.count("test_subtests SUBFAILED") == 1


def test_a_test_with_a_failed_subtest_fails(session: SessionResult) -> None:
    assert session.outcomes("test_subtests") == {"call": "failed"}


def test_every_test_is_reported_once(session: SessionResult) -> None:
    assert session.repeated() == []
    assert len(session.pids) == 1


# The other outputs of pytest.


def test_junit_has_one_testcase_per_test(
    session: SessionResult, junit: list[ElementTree.Element]
) -> None:
    names = [case.get("name") for case in junit]
    assert names == [nodeid.partition("::")[2] for nodeid in session.collected]


@pytest.mark.parametrize(
    "test", ["test_cause_and_waiting_peers", "test_last_words", "test_hang", "test_all_fail_alike"]
)
def test_junit_has_the_headline_as_its_message(
    session: SessionResult, junit: list[ElementTree.Element], test: str
) -> None:
    (failure,) = (f for case in junit if case.get("name") == test for f in case.iter("failure"))
    headline = call_of(session, test).headline
    assert failure.get("message") == headline
    assert failure.text is not None
    assert failure.text.startswith(headline)


def test_junit_has_the_merged_properties(junit: list[ElementTree.Element]) -> None:
    (case,) = (case for case in junit if case.get("name") == "test_properties")
    properties = {one.get("name"): one.get("value") for one in case.iter("property")}
    assert properties == {"same": "on all"} | {f"own [rank {n}]": str(n) for n in range(4)}


def test_durations_are_those_of_the_slowest_rank(session: SessionResult) -> None:
    line = re.search(r"^(\d+\.\d\d)s call +test_reports\.py::test_slow$", session.output, re.M)
    assert line is not None
    assert float(line[1]) >= 0.5


def test_a_suite_runs_without_the_cache(session: SessionResult) -> None:
    assert session.exit_code == pytest.ExitCode.TESTS_FAILED
    assert not (session.folder / ".pytest_cache").exists()


# The options of pytest and of the plugin.


PASSING = ["test_passes", "test_of_sizes[world_size=1]", "test_of_sizes[world_size=2]"]
SEED = 20_260_101
SEEDED = "test_fails_second[it's $HOME [x] & y]"


def ran(session: SessionResult) -> list[str]:
    """The tests that were run, in order."""
    names = (report.nodeid.partition("::")[2] for report in session.reports)
    return list(dict.fromkeys(names))


@pytest.fixture(scope="module")
def selection(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_selection.py": "selection.py"}, INI)


@pytest.fixture(scope="module")
def two_failures(selection: Suite) -> SessionResult:
    """Run in a folder below the suite's own, with another world size and another seed."""
    options = ("--maxfail=2", "-k", "fails", "--dcp-report-ranks=failed", "--tb=short")
    return selection.run("..", "--dcp-world-size=3", f"--dcp-seed={SEED}", *options, cwd="below")


@pytest.fixture(scope="module")
def one_failure(selection: Suite) -> SessionResult:
    options = ("-x", "--dcp-report-ranks=first", "--tb=line", "--setup-show")
    return selection.run(*options, cache=True)


def test_k_selects(two_failures: SessionResult) -> None:
    assert len(two_failures.collected) == 3


def test_maxfail_counts_tests_not_ranks(two_failures: SessionResult) -> None:
    assert ran(two_failures) == ["test_fails_first", SEEDED]


def test_output_of_failed_ranks_only(two_failures: SessionResult) -> None:
    assert captured(call_of(two_failures, "test_fails_first"), "stdout") == {
        "Captured stdout [rank 1] call": "printed by 1\n",
        "Captured stdout [rank 2] call": "printed by 2\n",
    }


def test_short_tracebacks_show_the_failing_line_only(two_failures: SessionResult) -> None:
    text = call_of(two_failures, "test_fails_first").text
    assert text.startswith("rank 1: ValueError: the cause\n")
    assert re.search(r'^    raise ValueError\("the cause"\)\nE +ValueError: the cause$', text, re.M)
    assert "def test_fails_first" not in text


def test_x_stops_after_the_first_failure(one_failure: SessionResult) -> None:
    assert ran(one_failure) == [*PASSING, "test_fails_first"]


def test_output_of_the_first_cause_only(one_failure: SessionResult) -> None:
    report = call_of(one_failure, "test_fails_first")
    assert captured(report, "stdout") == {"Captured stdout [rank 1] call": "printed by 1\n"}


def test_tracebacks_of_one_line_have_the_headline(one_failure: SessionResult) -> None:
    line = r"^\S+test_selection\.py:\d+: rank 1: ValueError: the cause$"
    assert len(re.findall(line, one_failure.output, re.M)) == 1


def test_setup_show_has_each_fixture_once(one_failure: SessionResult) -> None:
    shown = [line.split() for line in one_failure.output.splitlines()]
    assert shown.count(["SETUP", "F", "shown"]) == 1
    assert shown.count(["TEARDOWN", "F", "shown"]) == 1


@pytest.mark.usefixtures("one_failure")
def test_lf_runs_the_last_failures(selection: Suite) -> None:
    again = selection.run("--lf", "--tb=no", cache=True)
    assert ran(again) == ["test_fails_first"]
    assert " FAILURES " not in again.output
    assert " - rank 1: ValueError: the cause" in again.output


def test_collecting_starts_no_process(selection: Suite) -> None:
    collected = selection.run("--collect-only", "-q")
    assert [n.partition("::")[2] for n in collected.collected[:3]] == PASSING
    assert collected.children == {"loop": 0, "finish": 0}
    assert collected.exit_code == pytest.ExitCode.OK


# Headings.


def test_a_heading_shows_the_first_line_alone(session: SessionResult) -> None:
    report = call_of(session, "test_long_assertion")
    assert report.headline == "rank 0: AssertionError: first line" or re.match(
        r"rank \d: AssertionError: first line$", report.headline
    )
    assert report.message == report.headline
    lines = report.text.splitlines()
    assert all(re.match(r"  rank \d: AssertionError: first line, ", line) for line in lines[1:4])
    assert len({line.split()[1] for line in lines[1:4]}) == 3, "ranks that differ are not merged"
    assert "\nE         of rank " in report.text


def test_a_line_that_leads_in_brings_the_next_along(session: SessionResult) -> None:
    report = call_of(session, "test_text_that_leads_in")
    said = "RuntimeError: Error(s) in loading: Missing key(s): a"
    assert report.headline == f"ranks 0-3: {said}"


def test_files_are_named_from_the_root(session: SessionResult) -> None:
    report = call_of(session, "test_hang")
    top = report.text.partition(TABLE_TITLE)[0]
    assert re.search(r", at test_reports\.py:\d+ in test_hang", report.headline)
    assert str(session.folder) not in top
    table = section_of(report.text, TABLE_TITLE)
    assert re.search(r"^rank 2: at test_reports\.py:\d+ in test_hang$", table, re.M)


def test_a_default_seed_needs_no_line_to_rerun(session: SessionResult) -> None:
    assert not [one.nodeid for one in session.reports if RERUN_TITLE in one.text]


@pytest.mark.parametrize("workers", [(), ("-n1",)], ids=["alone", "xdist"])
def test_causes_are_red_and_echoes_dim(make_suite: MakeSuite, workers: tuple[str, ...]) -> None:
    suite = make_suite({"test_reports.py": "reports.py"}, INI)
    tests = "test_cause_and_waiting_peers or test_cause_and_later_failure"
    output = suite.run("-k", tests, "--color=yes", *workers).output
    bold_red, red, dim = "\x1b[31m\x1b[1m", "\x1b[31m", "\x1b[2m"
    assert f"{bold_red}rank 2: AssertionError: loss on 2" in output
    assert f"{dim}  ranks 0-1,3: still in call, in all_reduce" in output
    assert f"{bold_red}rank 1: ValueError: the cause" in output
    assert f"{red}  rank 3: KeyError: 'later', " in output


def test_no_colour_is_written_where_none_is_wanted(session: SessionResult) -> None:
    assert "\x1b[" not in session.output


# The line to rerun a test.


@pytest.fixture(scope="module")
def rerun(selection: Suite, two_failures: SessionResult) -> SessionResult:
    """Runs the line at the end of a failure, in the folder where it was shown."""
    return selection.run(*rerun_args(call_of(two_failures, SEEDED)), cwd="below")


def test_the_rerun_line_runs_just_that_test(rerun: SessionResult) -> None:
    assert rerun.collected == (f"test_selection.py::{SEEDED}",)


def test_the_rerun_line_fails_alike(rerun: SessionResult, two_failures: SessionResult) -> None:
    headline = call_of(two_failures, SEEDED).headline
    assert headline.startswith("ranks 0-2: AssertionError: in a world of 3")
    assert call_of(rerun, SEEDED).headline == headline


def test_the_rerun_line_gives_the_same_seed(
    rerun: SessionResult, two_failures: SessionResult
) -> None:
    seeds = {"Captured stdout [ranks 0-2] call": f"seed {SEED}\n"}
    assert captured(call_of(two_failures, SEEDED), "stdout") == seeds
    assert captured(call_of(rerun, SEEDED), "stdout") == seeds
