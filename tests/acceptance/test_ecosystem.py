"""Worlds beside other plugins: xdist, cov, rerunfailures, timeout, randomly, and pytest's own.

Whole sessions over suites of `samples/`, each run once and looked at by many tests.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coverage import Coverage
from hypothesis import settings

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, Report, SessionResult

    Run = Callable[..., SessionResult]

PASSED = {"call": "passed"}
FAILED = {"call": "failed"}
TABLE_TITLE = "stacks of the ranks that did not end"
RERUN_TITLE = "to rerun just this"

IS_NIGHTLY = settings().max_examples >= 10_000
DISTRIBUTIONS = ("load", "loadscope", "loadfile", "worksteal", "loadgroup")
"""Of which the ci profile tries the last two: the others differ in the order of tests alone."""
MEASURED = ("-n0 fork", "-n2 fork", "-n0 spawn", "-n2 spawn")
"""The ci profile leaves out the last: each thing it combines is covered by another."""
PASSING = """test_ordinary test_ordinary_subtests test_marked test_properties test_of_a_group
test_list[world_size=1] test_list[world_size=2] test_function_world test_after_the_failure
test_shares[first] test_shares[second] test_draws[a] test_draws[b] test_draws[c] test_draws[d]"""
FAILING = """test_ordinary_that_fails test_list[world_size=3] test_cause_and_waiting_peers
test_subtests test_dies test_fails"""
MIXED: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(PASSING.split(), PASSED),
    **dict.fromkeys(FAILING.split(), FAILED),
    "test_all_skip": {"call": "skipped"},
    "test_xfails": {"call": "xfailed"},
    "test_fails_in_teardown": {"call": "passed", "teardown": "error"},
}
"""Outcomes of the mixed suite, under every runner."""
OPTIONAL = "terminal skipping warnings logging faulthandler debugging capture junitxml subtests"
"""Plugins of pytest's own that worlds can do without."""


def name_of(report: Report) -> str:
    """The test's name, without its file and the group that xdist adds."""
    return report.nodeid.rpartition("::")[2].removesuffix("@together")


def outcomes(session: SessionResult) -> dict[str, dict[str, str]]:
    """Test -> phase -> category, of all that the terminal counts."""
    found: dict[str, dict[str, str]] = {}
    for report in session.reports:
        if report.category and not report.subtest:
            found.setdefault(name_of(report), {})[report.when] = report.category
    return found


def told(session: SessionResult) -> dict[tuple[str, str, bool], str]:
    """The texts of all failures, without the ranks' stacks and what differs from run to run."""
    table = re.compile(rf"^-+ {TABLE_TITLE} -+\n.*?(?=^-+ {RERUN_TITLE} -+$)", re.S | re.M)
    changing = re.compile(r"^\[gw\d\] .*\n|\d+\.\d\d s later|0x[0-9a-f]+|@together", re.M)

    def lasting(text: str) -> str:
        return changing.sub("", table.sub("", text)).strip()

    return {
        (name_of(report), report.when, report.subtest): lasting(report.text)
        for report in session.reports
        if report.category in ("failed", "error")
    }


def lines_with(text: str, file: Path) -> list[int]:
    return [n for n, line in enumerate(file.read_text().splitlines(), 1) if text in line]


# pytest-xdist.


@pytest.fixture(scope="module")
def mixed(make_suite: MakeSuite) -> Run:
    """Runs the mixed suite, once per set of arguments, whatever the order of the tests."""
    samples = ("mixed", "warm", "randomness")
    suite = make_suite({f"test_{name}.py": f"{name}.py" for name in samples})
    return functools.cache(suite.run)


@pytest.fixture(scope="module")
def alone(mixed: Run) -> SessionResult:
    """The mixed suite in one process."""
    return mixed("-n0")


@pytest.fixture(scope="module", params=DISTRIBUTIONS if IS_NIGHTLY else DISTRIBUTIONS[-2:])
def distributed(mixed: Run, request: pytest.FixtureRequest) -> SessionResult:
    """The mixed suite over two workers."""
    return mixed("-n2", "--dist", request.param)


def test_the_mixed_suite_has_the_outcomes_that_are_written_down(alone: SessionResult) -> None:
    assert outcomes(alone) == MIXED


def test_xdist_changes_no_outcome(distributed: SessionResult) -> None:
    assert outcomes(distributed) == MIXED
    assert distributed.exit_code == pytest.ExitCode.TESTS_FAILED
    assert distributed.repeated() == []


def test_xdist_changes_no_failures_text(alone: SessionResult, distributed: SessionResult) -> None:
    assert told(distributed) == told(alone)


def test_the_first_cause_and_the_folded_peers_survive_xdist(distributed: SessionResult) -> None:
    told_ = told(distributed)["test_cause_and_waiting_peers", "call", False].splitlines()
    assert told_[0] == "rank 1: AssertionError: the cause"
    assert re.fullmatch(r"  ranks 0,2: still in call, in all_reduce, at .*, ; killed", told_[1])


def test_sections_and_properties_survive_xdist(
    alone: SessionResult, distributed: SessionResult
) -> None:
    def kept(session: SessionResult) -> dict[tuple[str, str, bool], object]:
        reports = session.reports
        return {(name_of(r), r.when, r.subtest): (r.sections, r.properties) for r in reports}

    cause = kept(distributed)["test_cause_and_waiting_peers", "call", False]
    assert ("Captured stderr [ranks 0-2] call", "printed by all\n") in cause[0]
    assert kept(distributed) == kept(alone)


def test_a_warning_of_all_ranks_is_reported_once_through_xdist(distributed: SessionResult) -> None:
    assert distributed.warnings == ("UserWarning: told by all ranks",)


def test_subtests_of_ranks_survive_xdist(alone: SessionResult, distributed: SessionResult) -> None:
    def subtests(session: SessionResult) -> Counter[tuple[str, str]]:
        return Counter((name_of(r), r.category) for r in session.reports if r.subtest)

    assert subtests(alone)["test_subtests", "failed"] == 1
    assert "SUBFAILED[sub] (i=2) test_mixed.py::test_subtests - rank 1: " in alone.output
    assert subtests(distributed) == subtests(alone)


def test_nothing_outlives_the_workers(distributed: SessionResult) -> None:
    assert distributed.left_running == ()
    assert distributed.left_in_tmpdir == ()
    assert distributed.children["finish"] == 0


def test_tests_of_a_module_share_a_world_in_one_process(alone: SessionResult) -> None:
    shared = {(note["rank"], note["pid"]) for note in alone.noted("shared")}
    after = {note["pid"] for note in alone.noted("after the failure")}
    assert len(alone.noted("shared")) == 4
    assert len(shared) == len(after) == 2
    assert after.isdisjoint(pid for _, pid in shared)


@pytest.fixture(scope="module")
def killed_worker(make_suite: MakeSuite) -> SessionResult:
    suite = make_suite({"test_worker_killed.py": "worker_killed.py"})
    return suite.run("-n1")


def test_ranks_of_a_killed_worker_die_with_it(killed_worker: SessionResult) -> None:
    assert len({note["pid"] for note in killed_worker.noted("rank")}) == 4
    assert killed_worker.left_running == ()


def test_only_the_test_that_killed_its_worker_fails(killed_worker: SessionResult) -> None:
    assert "worker 'gw0' crashed while running" in killed_worker.output
    assert outcomes(killed_worker) == {
        "test_warm": PASSED,
        "test_kills_its_worker": {"???": "failed"},
    }


# pytest-cov.


@pytest.fixture(scope="module")
def covered(make_suite: MakeSuite) -> Run:
    """Runs the suite that runs `measured.py`, once with the same arguments."""
    suite = make_suite({"measured.py": "measured.py", "test_covers.py": "covers.py"})
    return functools.cache(suite.run)


def under_pytest_cov(covered: Run, workers: str, launch: str) -> tuple[SessionResult, Any]:
    """A session under pytest-cov, and what its report says of `measured.py`."""
    name = f"report{workers}-{launch}.json"
    how = (workers, f"--dcp-launch={launch}", "--cov=measured", "--cov-branch")
    session = covered(*how, f"--cov-report=json:{name}")
    return session, json.loads((session.folder / name).read_text())["files"]["measured.py"]


@pytest.fixture(scope="module", params=MEASURED if IS_NIGHTLY else MEASURED[:-1])
def coverage(covered: Run, request: pytest.FixtureRequest) -> tuple[SessionResult, Any]:
    """A session under pytest-cov for each way of starting processes."""
    return under_pytest_cov(covered, *request.param.split())


def never_run(session: SessionResult) -> list[int]:
    """The lines of `measured.py` that nothing runs."""
    (line,) = lines_with('return "nowhere"', session.folder / "measured.py")
    return [line]


def test_every_line_that_a_rank_ran_is_counted(coverage: tuple[SessionResult, Any]) -> None:
    session, report = coverage
    file = session.folder / "measured.py"
    ran = {*lines_with("return ", file), *lines_with("if rank", file)} - {*never_run(session)}
    assert len(ran) == 11
    assert report["missing_lines"] == never_run(session)
    assert ran <= {*report["executed_lines"]}


@pytest.mark.parametrize("workers", ["-n0", "-n2"] if IS_NIGHTLY else ["-n0"])
def test_spawned_ranks_are_measured_as_forked_ones_are(covered: Run, workers: str) -> None:
    _, forked = under_pytest_cov(covered, workers, "fork")
    _, spawned = under_pytest_cov(covered, workers, "spawn")
    assert spawned["executed_lines"] == forked["executed_lines"]
    assert spawned["executed_branches"] == forked["executed_branches"]


def test_coverage_of_ranks_leaves_no_files_and_no_complaint(
    coverage: tuple[SessionResult, Any],
) -> None:
    session, _ = coverage
    assert [path.name for path in session.folder.glob(".coverage*")] == [".coverage"]
    assert "database is locked" not in session.output
    assert session.warnings == ()
    assert session.left_in_tmpdir == ()


def test_coverage_changes_no_outcome(coverage: tuple[SessionResult, Any]) -> None:
    assert outcomes(coverage[0]) == {
        "test_ordinary": PASSED,
        "test_marked": PASSED,
        "test_fails": FAILED,
        "test_fails_while_a_peer_waits": FAILED,
        "test_warm[first]": PASSED,
        "test_warm[second]": PASSED,
        "test_function_world": PASSED,
        "test_failing_function_world": FAILED,
    }


@pytest.mark.parametrize("launch", ["fork", "spawn"] if IS_NIGHTLY else ["fork"])
def test_coverage_run_counts_every_line_in_its_one_file(covered: Run, launch: str) -> None:
    session = covered(f"--dcp-launch={launch}", under=("-m", "coverage", "run", "--source=."))
    measured = Coverage(data_file=str(session.folder / ".coverage"), config_file=False)
    measured.load()
    assert measured.analysis2(str(session.folder / "measured.py"))[3] == never_run(session)
    assert [path.name for path in session.folder.glob(".coverage*")] == [".coverage"]
    assert (outcomes(session)["test_marked"], session.warnings) == (PASSED, ())


# pytest-rerunfailures.


@pytest.fixture(scope="module")
def rerun(make_suite: MakeSuite) -> SessionResult:
    """Tests that fail at first; pytest-randomly shuffles them."""
    files = {"test_reruns.py": "reruns.py", "test_randomness.py": "randomness.py"}
    only = ("--only-rerun=AssertionError", "--only-rerun=WorldError")
    randomly = ("-p", "randomly", "--randomly-seed=7")
    return make_suite(files).run("--reruns=2", *only, *randomly)


@pytest.mark.parametrize(
    ("test", "categories"),
    [
        ("test_passes_the_third_time", ["rerun", "rerun", "passed"]),
        ("test_dies_the_first_time", ["rerun", "passed"]),
        ("test_fails_in_setup_the_first_time", ["rerun", "passed"]),
        ("test_is_marked_flaky", ["rerun", "passed"]),
        ("test_raises_a_value_error", ["failed"]),
        ("test_never_passes", ["rerun", "rerun", "failed"]),
    ],
)
def test_worlds_are_rerun_by_the_ranks_own_exception(
    rerun: SessionResult, test: str, categories: list[str]
) -> None:
    found = [r.category for r in rerun.reports if name_of(r) == test and r.category]
    assert found == categories


def test_every_rerun_gets_a_fresh_world_and_folder(rerun: SessionResult) -> None:
    notes = rerun.noted("test_passes_the_third_time")
    assert sorted((note["count"], note["rank"]) for note in notes) == [
        (count, rank) for count in (1, 2, 3) for rank in (0, 1)
    ]
    assert len({note["pid"] for note in notes}) == 6
    assert len({note["folder"] for note in notes}) == 3


def test_reruns_leave_nothing(rerun: SessionResult) -> None:
    assert rerun.left_running == ()
    assert rerun.left_in_tmpdir == ()


# pytest-timeout.


@pytest.fixture(scope="module")
def timed(make_suite: MakeSuite) -> SessionResult:
    suite = make_suite({"test_timeouts.py": "timeouts.py"})
    return suite.run("--timeout=1.5", "--dcp-timeout=2")


@pytest.mark.parametrize(
    ("test", "ranks", "limit"),
    [
        ("test_marker", "rank 1", "0.5"),
        ("test_marker_with_method_thread", "ranks 0-1", "0.5"),
        ("test_option", "rank 0", "1.5"),
        ("test_func_only_that_hangs", "rank 1", "0.5"),
        ("test_own_limit_is_lower", "ranks 0-1", "0.5"),
        ("test_plugins_limit_is_lower", "ranks 0-1", "0.5"),
    ],
)
def test_pytest_timeouts_limit_becomes_the_worlds(
    timed: SessionResult, test: str, ranks: str, limit: str
) -> None:
    report = timed.bad(test)
    assert timed.outcomes(test) == FAILED
    start = f"{ranks}: still in call at the time limit of {limit} s, at "
    assert re.match(rf"{re.escape(start)}.* in {test}$", report.headline)
    assert TABLE_TITLE in report.text
    assert "Timeout (>" not in report.text


def test_the_report_of_a_limit_has_every_ranks_stack(timed: SessionResult) -> None:
    text = timed.bad("test_marker").text
    assert re.search(r"^  rank 0: still in call .*, in all_reduce, at ", text, re.M)
    assert re.search(r"^rank 0: in all_reduce, at .* in test_marker$", text, re.M)
    assert re.search(r"^rank 1: at .* in test_marker$", text, re.M)


@pytest.mark.parametrize("test", ["test_longer_than_the_default", "test_func_only", "test_after"])
def test_pytest_timeouts_limit_replaces_the_default(timed: SessionResult, test: str) -> None:
    assert timed.outcomes(test) == PASSED


@pytest.mark.parametrize("test", ["test_ordinary", "test_function_world"])
def test_tests_without_the_marker_time_out_as_ever(timed: SessionResult, test: str) -> None:
    assert timed.outcomes(test) == FAILED
    assert timed.bad(test).message == "Failed: Timeout (>0.5s) from pytest-timeout."


def test_time_outs_leave_nothing(timed: SessionResult) -> None:
    assert timed.left_running == ()
    assert timed.left_in_tmpdir == ()


# pytest-randomly.


Draws = tuple[str, tuple[float, ...], tuple[float, ...]]


def drawn(session: SessionResult) -> Counter[Draws]:
    """(test, drawn in a fixture, drawn in the test) -> by how many ranks."""
    notes = session.noted("draws")
    return Counter((n["name"], tuple(n["fixture"]), tuple(n["test"])) for n in notes)


def order(session: SessionResult) -> list[str]:
    """The tests that drew, as they ran."""
    return list(dict.fromkeys(note["name"] for note in session.noted("draws")))


@pytest.mark.parametrize("name", ["alone", "rerun"])
def test_ranks_draw_alike_and_tests_differently(name: str, request: pytest.FixtureRequest) -> None:
    draws = drawn(request.getfixturevalue(name))
    assert sorted(test for test, _, _ in draws) == ["a", "b", "c", "d"]
    assert {*draws.values()} == {2}
    for i, _ in enumerate(("random", "numpy", "torch")):
        assert len({of_fixture[i] for _, of_fixture, _ in draws}) == 4
        assert len({of_test[i] for _, _, of_test in draws}) == 4


def test_draws_do_not_depend_on_the_worker(
    alone: SessionResult, distributed: SessionResult
) -> None:
    assert drawn(distributed) == drawn(alone)


def test_randomly_shuffles_and_seeds_worlds(alone: SessionResult, rerun: SessionResult) -> None:
    assert order(alone) == ["a", "b", "c", "d"]
    assert order(rerun) != order(alone)
    assert drawn(rerun).keys().isdisjoint(drawn(alone))


# pytest's own plugins.


@pytest.fixture(scope="module")
def cached(make_suite: MakeSuite) -> tuple[SessionResult, SessionResult]:
    """A session with -x; and one with --lf, the test mended, without pytest's optional plugins."""
    suite = make_suite({"test_lastfailed.py": "lastfailed.py"})
    first = suite.run("-x", cache=True)
    (suite.folder / "fixed").touch()
    without = (arg for name in OPTIONAL.split() for arg in ("-p", f"no:{name}"))
    return first, suite.run("--lf", *without, cache=True)


def test_x_stops_at_the_first_failed_world(cached: tuple[SessionResult, SessionResult]) -> None:
    assert outcomes(cached[0]) == {"test_passes": PASSED, "test_fails_at_first": FAILED}
    assert cached[0].left_running == ()


def test_lf_runs_only_the_failed_world(cached: tuple[SessionResult, SessionResult]) -> None:
    assert {name_of(report) for report in cached[1].reports} == {"test_fails_at_first"}


def test_worlds_do_without_pytests_optional_plugins(
    cached: tuple[SessionResult, SessionResult],
) -> None:
    assert outcomes(cached[1])["test_fails_at_first"]["call"] == "passed"
    assert cached[1].exit_code == pytest.ExitCode.OK
    assert cached[1].output == ""


def test_worlds_say_that_they_need_a_temporary_folder(make_suite: MakeSuite) -> None:
    session = make_suite({"test_lastfailed.py": "lastfailed.py"}).run("-p", "no:tmpdir")
    assert session.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: worlds need pytest's tmpdir plugin" in session.output
