"""A rank exits as an interpreter does: work left to the exit is done, or its loss reported.

Whole sessions over `samples/exits.py`, forked and spawned.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

PASSED = {"call": "passed"}
UNRAISABLE = "PytestUnraisableExceptionWarning: "


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_exits.py": "exits.py"}, ini="dcp_grace = 0.2")


BUFFERED = {"PYTHONUNBUFFERED": ""}
"""With that variable set Python has the C library keep no output."""


@pytest.fixture(scope="module")
def forked(suite: Suite) -> SessionResult:
    return suite.run(env=BUFFERED)


@pytest.fixture(scope="module")
def spawned(suite: Suite) -> SessionResult:
    tests = (
        "TestExits and (atexit or output or folder or memory and not killed)"
        " or TestErrors and (atexit or by_a_handler)"
    )
    return suite.run("--dcp-launch=spawn", "-k", tests, env=BUFFERED)


@pytest.fixture(scope="module", params=["forked", "spawned"])
def session(request: pytest.FixtureRequest) -> SessionResult:
    found: SessionResult = request.getfixturevalue(request.param)
    return found


def left(session: SessionResult) -> Counter[str]:
    return Counter(note["what"] for note in session.noted("left"))


def test_handlers_of_a_rank_run_in_each_rank(session: SessionResult) -> None:
    assert session.outcomes("TestExits::test_atexit") == PASSED
    assert left(session)["atexit"] == 2


@pytest.mark.parametrize("what", ["finalizer", "thread", "failure", "warm"])
def test_handlers_run_and_threads_are_joined(forked: SessionResult, what: str) -> None:
    assert left(forked)[what] == 2


def test_handlers_run_in_a_rank_that_outlives_its_peer(forked: SessionResult) -> None:
    assert left(forked)["survivor"] == 1


def test_handlers_of_the_controller_do_not_run_in_forked_ranks(forked: SessionResult) -> None:
    (controller,) = {note["pid"] for note in forked.noted("imported")}
    for what in ("atexit of the module", "finalizer of the module"):
        assert {n["pid"] for n in forked.noted("left") if n["what"] == what} == {controller}
    assert len({note["pid"] for note in forked.noted("ran")}) > 20


@pytest.mark.parametrize("about", ["folder", "memory"])
def test_files_that_an_exit_removes_are_gone(session: SessionResult, about: str) -> None:
    paths = [Path(note["path"]) for note in session.noted(about)]
    assert len(paths) >= 2
    assert [path for path in paths if path.exists()] == []
    assert session.left_in_tmpdir == ()
    assert session.left_running == ()


def test_memory_that_a_killed_rank_shared_is_freed(forked: SessionResult) -> None:
    paths = [Path(note["path"]) for note in forked.noted("memory")]
    assert len(paths) == 4
    assert [path for path in paths if path.exists()] == []


def test_log_handlers_are_flushed(forked: SessionResult) -> None:
    paths = [Path(note["path"]) for note in forked.noted("log")]
    assert [path.read_text() for path in paths] == ["kept in memory\n"] * 2


def test_output_of_c_code_is_in_the_phase_that_printed_it(session: SessionResult) -> None:
    phases = session.phases("TestExits::test_output_of_c")
    of_call, of_exit = (dict(phases[when].sections) for when in ("call", "teardown"))
    assert of_call == {"Captured stdout [ranks 0-1] call": "printed by C in the test\n"}
    assert of_exit["Captured stdout [ranks 0-1] teardown"] == "printed by C at the exit\n"


def test_output_at_exit_is_output_of_the_test(session: SessionResult) -> None:
    sections = dict(session.phases("TestExits::test_atexit")["teardown"].sections)
    printed = {
        f"Captured stdout [rank {n}] teardown": f"printed at the exit of {n}\n" for n in "01"
    }
    assert printed.items() <= sections.items()


ERRORS = [
    ("test_atexit", "rank 1: Exception ignored in atexit callback: ", "KeyError: 'at exit'"),
    ("test_finalizer", "ranks 0-1: Exception ignored in a finalizer at exit", "'no number'"),
    ("test_cycle", "ranks 0-1: Exception ignored in: ", "ValueError: in a cycle"),
]


def warned(session: SessionResult, test: str) -> list[str]:
    return [text for text in session.warnings if f"::{test}: " in text]


@pytest.mark.parametrize(("test", "head", "error"), ERRORS)
def test_an_error_at_exit_is_a_warning(
    forked: SessionResult, test: str, head: str, error: str
) -> None:
    (text,) = warned(forked, f"TestErrors::{test}")
    assert text.startswith(f"{UNRAISABLE}test_exits.py::TestErrors::{test}: {head}")
    assert error in text
    assert "Traceback (most recent call last):" in text
    assert forked.outcomes(f"TestErrors::{test}") == PASSED


def test_an_error_at_exit_of_a_spawned_rank_is_a_warning(spawned: SessionResult) -> None:
    (text,) = warned(spawned, "TestErrors::test_atexit")
    assert text.startswith(f"{UNRAISABLE}test_exits.py::TestErrors::test_atexit: rank 1: ")


def test_an_error_at_exit_of_a_function_s_world_is_a_warning(forked: SessionResult) -> None:
    (text,) = warned(forked, "test_functions")
    assert text.startswith(f"{UNRAISABLE}test_exits.py::test_functions: ranks 0-1: ")
    assert ("Captured stdout call", "[ranks 0-1] printed at exit\n") in forked.phases(
        "test_functions"
    )["call"].sections


def test_where_warnings_are_errors_an_error_at_exit_fails_the_test(suite: Suite) -> None:
    session = suite.run("-W", "error", "-k", "TestErrors and (cycle or atexit or finalizer)")
    for test, head, error in ERRORS:
        report = session.bad(f"TestErrors::{test}")
        assert report.when == "teardown"
        assert head in report.text
        assert error in report.text


THREADS = [
    ("test_thread_that_goes_on", "rank 1 left thread 'sleeper' running"),
    ("test_worker_that_hangs", "ranks 0-1 left thread 'worker_0' running"),
]


@pytest.mark.parametrize(("test", "text"), THREADS)
def test_a_thread_that_would_hold_an_interpreter_up_is_named(
    forked: SessionResult, test: str, text: str
) -> None:
    (warning,) = warned(forked, f"TestErrors::{test}")
    assert warning.startswith("LeftBehindWarning: ")
    assert text in warning
    assert forked.phases(f"TestErrors::{test}")["teardown"].duration_s < 10.0


def test_an_executor_that_is_idle_ends_at_once(forked: SessionResult) -> None:
    assert warned(forked, "TestExits::test_executor_that_is_idle") == []
    assert forked.phases("test_executor_that_is_idle")["teardown"].duration_s < 1.9


def test_a_daemon_child_is_ended_and_another_is_named(forked: SessionResult) -> None:
    (warning,) = warned(forked, "TestErrors::test_child_that_goes_on")
    assert "rank 0 left process " in warning


@pytest.mark.parametrize(
    ("test", "text"),
    [
        ("test_exit_code", "rank 1: exited with code 3 after its verdict"),
        ("test_signal_at_exit", "rank 1: was killed by signal 11 (SIGSEGV) after its"),
    ],
)
def test_an_exit_with_another_code_is_an_error(forked: SessionResult, test: str, text: str) -> None:
    report = forked.bad(f"TestErrors::{test}")
    assert report.when == "teardown"
    assert report.headline.startswith(text)


NOT_FINISHED = "rank 1: exited with code 0 before its exit had finished"


@pytest.mark.parametrize(
    "test",
    [
        "TestErrors::test_end_of_process_by_a_handler",
        "TestErrors::test_end_of_process_by_a_thread",
        "TestErrors::test_exit_goes_on_in_a_child",
        "TestWarmEnd::test_end_of_process_by_a_handler",
    ],
)
def test_code_0_before_the_end_of_the_exit_is_an_error(forked: SessionResult, test: str) -> None:
    report = forked.bad(test)
    assert report.when == "teardown"
    assert report.headline.startswith(NOT_FINISHED)


def test_code_0_before_the_end_of_a_spawned_rank_s_exit_is_an_error(
    spawned: SessionResult,
) -> None:
    report = spawned.bad("TestErrors::test_end_of_process_by_a_handler")
    assert report.when == "teardown"
    assert report.headline.startswith(NOT_FINISHED)


def test_a_child_that_is_forked_at_exit_does_not_speak_for_its_rank(forked: SessionResult) -> None:
    test = "TestErrors::test_child_that_is_forked_at_exit"
    assert forked.outcomes(test) == PASSED
    sections = dict(forked.phases(test)["teardown"].sections)
    assert "cannot speak for the rank" not in "".join(sections.values())
