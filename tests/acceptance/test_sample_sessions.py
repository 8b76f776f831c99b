"""Sessions that a server forks are as those of a new interpreter, except that torch is imported."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from support.session_server import starts_alike

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_session_start.py": "session_start.py"})


def run(suite: Suite, test: str, **how: Any) -> SessionResult:
    return suite.run("-p", "pytest_dcp", f"test_session_start.py::{test}", **how)


def test_a_forked_session_begins_as_a_new_one_does(suite: Suite) -> None:
    forked, new = (run(suite, "test_start", new_interpreter=new) for new in (False, True))
    assert forked.noted("torch")[0]["imported"]
    assert not new.noted("torch")[0]["imported"]
    facts = [{k: v for k, v in s.noted("start")[0].items() if k != "pid"} for s in (forked, new)]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("new", [False, True], ids=["forked", "new"])
def test_processes_that_a_session_leaves_are_found(suite: Suite, new: bool) -> None:
    session = run(suite, "test_leaves_a_process", new_interpreter=new)
    assert session.exit_code == pytest.ExitCode.OK
    assert len(session.left_running) == 1


def test_its_end_by_a_signal_is_its_exit_code(suite: Suite) -> None:
    assert run(suite, "test_ends_by_a_signal").exit_code == -9


def test_a_session_that_is_late_is_killed(suite: Suite) -> None:
    with pytest.raises(AssertionError, match=r"did not end in 0\.01 s") as caught:
        run(suite, "test_start", within_s=0.01)
    assert isinstance(caught.value.__cause__, subprocess.TimeoutExpired)


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "OMP_NUM_THREADS", "COVERAGE_PROCESS_START"])
def test_a_variable_that_is_read_at_the_start_needs_a_new_interpreter(name: str) -> None:
    assert not starts_alike({name: "1"})
    assert starts_alike({"COLUMNS": "80"})
