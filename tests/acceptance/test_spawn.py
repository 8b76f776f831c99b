"""Ranks as new interpreters: the contract of forked ones, chosen where forking is unsafe.

The samples run in few sessions, since every world of them imports torch anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

PASSED = {"call": "passed"}
FAILED = {"call": "failed"}
LIMIT_S = 3.0
"""timeout= of test_hangs."""
MARGIN_S = 5.0
"""For taking stacks, killing and reaping on a machine that does other work too."""
INI = """
dcp_launch = spawn
dcp_grace = 0.5
markers = fine: what is chosen with -m
"""
CONFTEST = """
import pytest

@pytest.fixture
def from_conftest() -> str:
    return "from conftest.py"
"""
NESTED_CONFTEST = """
import pytest

@pytest.fixture(scope="session")
def from_nested(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"from {tmp_path_factory.mktemp('nested').name}"
"""
NESTED = """
import pytest
from beside import BESIDE

class TestNested:
    @pytest.mark.world_size(1)
    def test_nested(self, from_conftest: str, from_nested: str) -> None:
        assert (from_conftest, from_nested, BESIDE) == ("from conftest.py", "from nested0", 1)
"""
ONE_WORLD = """
import pytest

@pytest.mark.world_size(1)
def test_world() -> None:
    pass

def test_ordinary() -> None:
    pass
"""


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    files = {
        "conftest.py": CONFTEST,
        "test_spawned.py": "spawned.py",
        "test_spawned_warm.py": "spawned_warm.py",
        "test_spawned_functions.py": "spawned_functions.py",
        "spawned_worker.py": "spawned_worker.py",
        "some/where/conftest.py": NESTED_CONFTEST,
        "some/where/beside.py": "BESIDE = 1\n",
        "some/where/test_nested.py": NESTED,
    }
    return make_suite(files, INI)


@pytest.fixture(scope="module")
def session(suite: Suite) -> SessionResult:
    """The session of all samples, with pytest's cache of failures."""
    return suite.run(cache=True)


# The contract.


@pytest.mark.parametrize(
    ("test", "outcomes"),
    [
        ("test_passes", PASSED),
        ("test_fails", FAILED),
        ("test_skips", {"call": "skipped"}),
        ("test_xfails", {"call": "xfailed"}),
        ("test_crashes", FAILED),
        ("test_hangs", FAILED),
        ("test_functions", PASSED),
        ("test_nested", PASSED),
    ],
)
def test_spawned_ranks_come_to_the_same_verdict(
    session: SessionResult, test: str, outcomes: Mapping[str, str]
) -> None:
    assert session.outcomes(test) == outcomes


@pytest.mark.parametrize(
    ("test", "headline"),
    [
        ("test_fails", r"rank 1: AssertionError: assert \{'rank': 1\} == \{'rank': 0\}"),
        ("test_crashes", "rank 1: exited with code 3 in call, without a verdict$"),
        ("test_hangs", "rank 0: still in call at the time limit of 3 s, at .* in test_hangs$"),
    ],
)
def test_a_failure_names_the_spawned_rank_and_the_cause(
    session: SessionResult, test: str, headline: str
) -> None:
    assert re.match(headline, session.bad(test).message)


def test_assertions_are_introspected_in_spawned_ranks(session: SessionResult) -> None:
    text = session.bad("test_fails").text
    assert '>       assert found == {"rank": 0}' in text
    assert "{'rank': 1} != {'rank': 0}" in text


def test_a_hang_of_a_spawned_rank_ends_at_the_limit_with_its_stack(session: SessionResult) -> None:
    duration_s = session.phases("test_hangs")["call"].duration_s
    assert LIMIT_S <= duration_s < LIMIT_S + MARGIN_S
    assert re.search(
        r'File ".*test_spawned.py", line \d+ in test_hangs', session.bad("test_hangs").text
    )


def test_output_of_a_spawned_rank_is_shown_as_its_own(session: SessionResult) -> None:
    assert dict(session.bad("test_fails").sections) == {
        f"Captured {name} [rank {rank}] call": f"{text} of rank {rank}\n"
        for name, text in (("stdout", "out"), ("stderr", "err"))
        for rank in (0, 1)
    }


def test_output_of_a_spawned_rank_that_was_killed_is_shown(session: SessionResult) -> None:
    shown = dict(session.bad("test_hangs").sections)
    assert shown == {"Captured stdout [rank 0] call": "before the hang\n"}


def test_every_spawned_rank_is_a_child_of_the_controller(session: SessionResult) -> None:
    (controller,) = {report.pid for report in session.reports}
    noted = session.noted("rank")
    assert [note["parent"] for note in noted] == [controller] * 2
    assert {note["rank"] for note in noted} == {0, 1}


def test_a_module_can_keep_its_spawned_world_under_any_test_names(
    session: SessionResult,
) -> None:
    ids = [report for report in session.reports if "test_spawned_warm.py" in report.nodeid]
    assert {r.category for r in ids if "test_id" in r.nodeid and r.when == "call"} == {"passed"}
    noted = session.noted("id")
    assert len(noted) == 2 * 10
    assert len({(note["rank"], note["pid"]) for note in noted}) == 2


def test_nothing_is_left_of_spawned_ranks(session: SessionResult) -> None:
    assert session.left_running == ()
    assert session.left_in_tmpdir == ()
    assert session.repeated() == []


# The command line.


def test_ranks_are_spawned_for_the_tests_of_any_command_line(
    session: SessionResult, suite: Suite
) -> None:
    args = ("--last-failed", "-k", "fails or passes", "-m", "not fine", "../test_spawned.py")
    chosen = suite.run(*args, cwd="elsewhere", cache=True)
    assert {report.nodeid for report in chosen.reports} == {"test_spawned.py::test_fails"}
    assert chosen.bad("test_fails").message == session.bad("test_fails").message


def test_spawned_ranks_leave_the_cache_of_the_session_alone(
    session: SessionResult, suite: Suite
) -> None:
    cache = suite.folder / ".pytest_cache/v/cache"
    failed = {report.nodeid for report in session.reports if report.category == "failed"}
    assert set(json.loads((cache / "lastfailed").read_text())) == failed
    known = json.loads((cache / "nodeids").read_text())
    assert len(known) == len({report.nodeid for report in session.reports})


def test_workers_of_xdist_spawn_ranks_too(suite: Suite) -> None:
    distributed = suite.run("-n2", "spawned_worker.py")
    assert distributed.outcomes("test_worker") == PASSED
    assert distributed.outcomes("test_fails_in_worker") == FAILED
    (worker,) = distributed.noted("worker")
    assert worker["id"] in ("gw0", "gw1")
    assert distributed.left_running == ()


def test_a_rank_that_collects_something_else_says_so(make_suite: MakeSuite) -> None:
    test = 'import os\nif "RANK" in os.environ:\n    raise OSError("not in a rank")\n' + ONE_WORLD
    session = make_suite({"test_other.py": test}, INI).run()
    assert session.outcomes("test_world") == {"setup": "error"}
    ((title, said),) = session.bad("test_world").sections
    assert title == "Captured stderr [rank 0] setup"
    assert "this rank did not collect 'test_other.py::test_world'" in said
    assert "OSError: not in a rank" in said


# The choice.

THREAD = """
import threading

threading.Thread(target=threading.Event().wait, name="poller", daemon=True).start()
"""
THREAD_REASON = "threads were started at collection ('poller')"
CUDA = """
import torch

torch.cuda.is_initialized = lambda: True
"""
CUDA_REASON = "CUDA was initialised at collection"


def notes_of(session: SessionResult) -> list[str]:
    return re.findall("pytest_dcp: .*", session.output)


@pytest.mark.parametrize(
    ("first", "reason"), [(THREAD, THREAD_REASON), (CUDA, CUDA_REASON)], ids=["thread", "cuda"]
)
def test_ranks_are_spawned_where_forking_is_unsafe_and_one_line_says_why(
    make_suite: MakeSuite, first: str, reason: str
) -> None:
    session = make_suite({"test_one.py": first + ONE_WORLD}).run()
    assert session.outcomes("test_world") == PASSED
    assert notes_of(session) == [f"pytest_dcp: ranks are spawned, not forked: {reason}"]


def test_workers_of_xdist_say_once_why_they_spawn(make_suite: MakeSuite) -> None:
    suite = make_suite({"conftest.py": THREAD, "test_one.py": ONE_WORLD})
    session = suite.run("-n2")
    assert notes_of(session) == [f"pytest_dcp: ranks are spawned, not forked: {THREAD_REASON}"]


@pytest.fixture(scope="module")
def refused(make_suite: MakeSuite) -> SessionResult:
    """A session that is made to fork with `--dcp-launch=fork`."""
    return make_suite({"test_one.py": THREAD + ONE_WORLD}).run("--dcp-launch=fork")


def test_forking_where_it_is_unsafe_is_an_error_that_names_the_thread(
    refused: SessionResult,
) -> None:
    assert f"--dcp-launch=fork, but forking is unsafe here: {THREAD_REASON}" in refused.output
    assert refused.exit_code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    assert refused.reports == ()


def test_forking_where_it_is_unsafe_is_the_users_error(refused: SessionResult) -> None:
    assert refused.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in refused.output
