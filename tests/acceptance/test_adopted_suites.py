"""`pytest --dcp-adopt`: suites that start their ranks themselves, run with no edit.

One session over `samples/adopted_torch.py` and one over `samples/adopted_processes.py`, neither of
which knows us; and parts of them under pytest-xdist, with exceptions, and without the option.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

LIMIT_S = 8
"""A test that hangs runs to it; all others end in a second or two."""
OPTIONS = ("--dcp-adopt", f"--dcp-timeout={LIMIT_S}")
PASSED = {"call": "passed"}
FAILED = {"call": "failed"}
SKIPPED = {"call": "skipped"}
MARKED = """
import multiprocessing, os, sys
import pytest

def die():
    os._exit(3)

def test_imports(request):
    found = [name for name in sys.modules if name.startswith("pytest_dcp._harness.adoption")]
    assert bool(found) == bool(request.config.option.dcp_adopt)

def run():
    process = multiprocessing.get_context("spawn").Process(target=die)
    process.start()
    process.join()

def test_adopted():
    run()

@pytest.mark.dcp_adopt(False)
def test_opted_out():
    run()

class TestNamed:
    def test_excepted(self):
        run()

    @pytest.mark.dcp_adopt(True)
    def test_marked_again(self):
        run()
"""
WRONG = """
import pytest

@pytest.mark.dcp_adopt
def test_without_a_value():
    pass
"""


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite(
        {
            "test_torch.py": "adopted_torch.py",
            "test_processes.py": "adopted_processes.py",
            "test_marked.py": MARKED,
        }
    )


@pytest.fixture(scope="module")
def of_torch(suite: Suite) -> SessionResult:
    return suite.run(*OPTIONS, "test_torch.py")


@pytest.fixture(scope="module")
def of_processes(suite: Suite) -> SessionResult:
    return suite.run(*OPTIONS, "test_processes.py")


# torch's own test classes.


@pytest.mark.parametrize(
    ("test", "outcomes"),
    [
        ("TestRanks::test_passes", PASSED),
        ("TestRanks::test_last_rank_fails", FAILED),
        ("TestRanks::test_last_rank_exits", FAILED),
        ("TestRanks::test_last_rank_dies", FAILED),
        ("TestRanks::test_hangs", FAILED),
        ("TestRanks::test_skips_itself", SKIPPED),
        ("TestRanks::test_needs_gpus", SKIPPED),
        ("TestRanks::test_one_rank_skips", FAILED),
        ("TestRanks::test_expected_to_fail", {"call": "xfailed"}),
        ("TestExpectsExitCodes::test_ends_as_expected", PASSED),
        ("TestExpectsExitCodes::test_does_not_end_as_expected", FAILED),
        ("TestTensors::test_shards", PASSED),
        ("TestSharded::test_group", PASSED),
        ("TestContinuous::test_a_passes", PASSED),
        ("TestContinuous::test_b_fails", FAILED),
        ("TestContinuous::test_c_follows_a_failure", PASSED),
        ("TestContinuous::test_d_skips", SKIPPED),
        ("TestContinuous::test_e_uses_the_group_of_the_last", PASSED),
        ("TestThreads::test_threads", PASSED),
    ],
)
def test_every_rank_of_a_torch_test_counts(
    of_torch: SessionResult, test: str, outcomes: dict[str, str]
) -> None:
    assert of_torch.outcomes(test) == outcomes


def test_a_failure_names_its_rank_and_explains_its_assertion(of_torch: SessionResult) -> None:
    report = of_torch.bad("TestRanks::test_last_rank_fails")
    assert report.headline.startswith("rank 1: AssertionError: assert ['a', 'b'] == ['a', 'c']")
    assert "At index 1 diff: 'b' != 'c'" in report.text
    assert "common_distributed.py" not in report.text  # frames that lead to the test


def test_an_exit_and_a_death_that_torch_does_not_look_at_are_failures(
    of_torch: SessionResult,
) -> None:
    exits = of_torch.bad("TestRanks::test_last_rank_exits")
    assert exits.headline.startswith("rank 1: ProcessExitError: the process ended itself by")
    assert "sys.exit(3)" in exits.headline
    dies = of_torch.bad("TestRanks::test_last_rank_dies")
    assert dies.headline.startswith("rank 1: exited with code 7")


def test_an_unexpected_exit_code_is_named_with_the_expected_one(of_torch: SessionResult) -> None:
    report = of_torch.bad("TestExpectsExitCodes::test_does_not_end_as_expected")
    assert report.headline == "rank 0: ended with exit code 0, and the test expects 9"


def test_a_hang_shows_the_stacks_of_its_ranks(of_torch: SessionResult) -> None:
    report = of_torch.bad("TestRanks::test_hangs")
    assert report.headline.startswith(
        f"rank 0: still in call at the time limit of {LIMIT_S} s, at test_torch.py:"
    )
    assert "rank 1: had ended call (passed)" in report.text
    assert "in test_hangs" in report.text


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("test_skips_itself", "Skipped: no such feature here"),
        ("test_needs_gpus", "Skipped: Need at least 2 CUDA devices"),
    ],
)
def test_a_skip_has_the_reason_that_the_ranks_gave(
    of_torch: SessionResult, test: str, reason: str
) -> None:
    report = of_torch.bad(f"TestRanks::{test}")
    assert (report.text, report.path.endswith("test_torch.py")) == (reason, True)


def test_one_rank_that_skips_is_no_skip(of_torch: SessionResult) -> None:
    report = of_torch.bad("TestRanks::test_one_rank_skips")
    assert "a test is skipped only when every rank skips" in report.headline


# Processes that a suite starts itself.


@pytest.mark.parametrize(
    ("test", "outcomes"),
    [
        ("test_spawn_with_a_fixed_port[1]", PASSED),
        ("test_spawn_with_a_fixed_port[2]", PASSED),
        ("test_spawn_fails", FAILED),
        ("test_spawn_is_expected_to_fail", PASSED),
        ("test_spawn_without_join", FAILED),
        ("test_exit_codes_are_not_looked_at", FAILED),
        ("test_only_the_first_exit_code_is_looked_at", FAILED),
        ("test_exit_codes_are_looked_at", PASSED),
        ("test_wrong_exit_codes_are_looked_at", FAILED),
        ("test_queue", PASSED),
        ("test_pipe_and_sentinel", PASSED),
        ("test_waits_in_vain", FAILED),
        ("test_terminates_its_own", PASSED),
        ("test_process_by_default", FAILED),
        ("test_method_of_an_object", FAILED),
        ("test_process_with_a_run_of_its_own", FAILED),
        ("test_closure", PASSED),
        ("test_closure_fails", FAILED),
        ("test_without_processes", PASSED),
    ],
)
def test_a_process_fails_its_test_unless_the_test_looks_at_the_failure(
    of_processes: SessionResult, test: str, outcomes: dict[str, str]
) -> None:
    assert of_processes.outcomes(test) == outcomes


def test_a_spawned_failure_is_shown_as_that_of_a_marked_test(of_processes: SessionResult) -> None:
    report = of_processes.bad("test_spawn_fails")
    assert report.headline == "rank 1: ValueError: one of them"
    assert "rank 0: still in call, at test_processes.py:" in report.text  # its stack, after 1 s
    assert "torch/multiprocessing/spawn.py:" not in report.text.partition("stacks of")[0]


@pytest.mark.parametrize(
    ("test", "headline"),
    [
        ("test_spawn_without_join", "rank 1: exited with code 4"),
        ("test_exit_codes_are_not_looked_at", "rank 1: exited with code 5"),
        ("test_only_the_first_exit_code_is_looked_at", "rank 1: exited with code 5"),
        ("test_waits_in_vain", "rank 0: exited with code 6"),
        ("test_process_by_default", "rank 0: exited with code 8"),
        ("test_closure_fails", "local, which ran as it is written, ended with exit code 3"),
        ("test_method_of_an_object", "rank 0: AssertionError: assert 2 == 1"),
        ("test_process_with_a_run_of_its_own", "rank 0: ValueError: in checker"),
    ],
)
def test_a_failure_that_the_test_swallows_names_the_process(
    of_processes: SessionResult, test: str, headline: str
) -> None:
    assert of_processes.bad(test).headline.startswith(headline)


def test_an_assertion_about_a_process_is_the_test_s_own_failure(
    of_processes: SessionResult,
) -> None:
    report = of_processes.bad("test_wrong_exit_codes_are_looked_at")
    assert "assert [0, 5] == [0, 0]" in report.text


def test_the_output_of_ranks_is_in_the_report(of_processes: SessionResult) -> None:
    sections = dict(of_processes.phases("test_spawn_with_a_fixed_port[1]")["call"].sections)
    assert sections["Captured stdout [rank 1] call"] == "added up in rank 1\n"


def test_a_closure_runs_as_it_is_written_with_a_warning(of_processes: SessionResult) -> None:
    (warning,) = [text for text in of_processes.warnings if "test_closure.<locals>" in text]
    assert (
        "the process of test_closure.<locals>.local runs as it is written, not as a rank: it is no "
        "function at the top level of a module"
    ) in warning


def test_nothing_outlives_the_sessions(
    of_torch: SessionResult, of_processes: SessionResult
) -> None:
    assert of_torch.left_running == of_processes.left_running == ()


# Which tests are adopted.


def test_tests_opt_out_by_a_marker_and_by_their_names(suite: Suite) -> None:
    result = suite.run(*OPTIONS, "--dcp-adopt-except", "*::TestNamed::*", "test_marked.py")
    assert result.outcomes("test_adopted") == FAILED
    assert result.outcomes("test_opted_out") == PASSED
    assert result.outcomes("TestNamed::test_excepted") == PASSED
    assert result.outcomes("TestNamed::test_marked_again") == FAILED


def test_without_the_option_processes_are_the_test_s_own(suite: Suite) -> None:
    result = suite.run("test_marked.py")
    assert {report.category for report in result.reports if report.when == "call"} == {"passed"}


def test_a_marker_without_a_value_is_a_usage_error(make_suite: MakeSuite) -> None:
    result = make_suite({"test_wrong.py": WRONG}).run("--dcp-adopt")
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert (
        "test_wrong.py::test_without_a_value: @pytest.mark.dcp_adopt takes True or False, as in "
        "dcp_adopt(False); got ()"
    ) in result.output


def test_xdist_gives_the_same_outcomes(suite: Suite, of_processes: SessionResult) -> None:
    result = suite.run(*OPTIONS, "-n2", "-k", "not in_vain", "test_processes.py")
    expected = {
        report.nodeid: report.category
        for report in of_processes.reports
        if report.when == "call" and "in_vain" not in report.nodeid
    }
    found = {one.nodeid: one.category for one in result.reports if one.when == "call"}
    assert found == expected
    assert "\nrank 1: ValueError: one of them" in result.bad("test_spawn_fails").text
