"""Fixtures in ranks, folders, GPUs, and a machine shared with other sessions.

Whole sessions over suites of `samples/`, each run once and looked at by many tests.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

PASSED = {"call": "passed"}
FAILED = {"call": "failed"}
SETUP_ERROR = {"setup": "error"}
IN_RANKS = """scopes_in_the_controller scopes autouse caplog capsys capfd monkeypatch recwarn warns
monkeypatch_stays_in_its_ranks warnings_are_errors tmp_path environment own_process_group mesh
mesh_by_default world checkpoint_dir_without_a_marker"""
"""Tests of `samples/fixtures.py` that look for themselves."""

# Fixtures.


@pytest.fixture(scope="module")
def fixtures(make_suite: MakeSuite) -> SessionResult:
    """Fixtures, folders under the default retention policy, and worlds without their GPUs."""
    samples = ("fixtures", "retention", "gpus")
    files = {f"test_{name}.py": f"{name}.py" for name in samples}
    suite = make_suite({"conftest.py": "scoped_conftest.py", **files})
    return suite.run("-rs", env={"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("test", IN_RANKS.split())
def test_fixtures_work_in_ranks_as_in_any_test(fixtures: SessionResult, test: str) -> None:
    assert fixtures.outcomes(f"test_{test}") == PASSED


def test_fixtures_of_every_scope_live_once_in_each_rank(fixtures: SessionResult) -> None:
    scopes = ("session", "module", "class", "function")
    lifetime = [("set up", scope) for scope in scopes]
    lifetime += [("torn down", scope) for scope in reversed(scopes)]
    for where in ("0", "1", "controller"):
        noted = [note for note in fixtures.noted("lifetime") if note["where"] == where]
        assert [(note["event"], note["scope"]) for note in noted] == lifetime
        assert len({note["pid"] for note in noted}) == 1


def test_tmp_path_is_each_ranks_own_below_the_sessions_base(fixtures: SessionResult) -> None:
    (base,) = {note["path"] for note in fixtures.noted("basetemp")}
    noted = fixtures.noted("tmp_path")
    paths = {note["rank"]: Path(note["path"]) for note in noted}
    assert paths.keys() == {0, 1}
    assert paths[0] != paths[1]
    for note in noted:
        assert paths[note["rank"]].is_relative_to(note["base"])
        assert Path(note["base"]).is_relative_to(base)
        assert (paths[note["rank"]] / "mine").read_text() == str(note["rank"])


def test_rank0_first_lets_rank_0_go_first(fixtures: SessionResult) -> None:
    assert [note["rank"] for note in fixtures.noted("rank0_first")] == [0, 1]


def test_a_warning_of_all_ranks_is_reported_once(fixtures: SessionResult) -> None:
    assert fixtures.warnings == ("UserWarning: told by all ranks",)


@pytest.mark.parametrize("name", ["rank", "local_rank", "world_size", "device", "world"])
def test_a_fixture_of_ranks_says_that_the_marker_is_missing(
    fixtures: SessionResult, name: str
) -> None:
    report = fixtures.bad(f"test_without_a_marker[{name}]")
    assert report.text == (
        f"the fixture {name!r} exists inside a world: mark the test with @pytest.mark.world_size(n)"
    )


def test_device_mesh_says_that_the_marker_is_missing(fixtures: SessionResult) -> None:
    test = "test_device_mesh_without_a_marker"
    assert fixtures.outcomes(test) == SETUP_ERROR
    assert "the fixture 'device_mesh' exists inside a world: mark" in fixtures.bad(test).text


@pytest.fixture(scope="module")
def wide(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_wide_fixtures.py": "wide_fixtures.py"}).run()


@pytest.mark.parametrize("launch", ["fork", "spawn"])
def test_fixtures_of_any_scope_use_those_of_the_world(
    make_suite: MakeSuite, wide: SessionResult, launch: str
) -> None:
    session = wide
    if launch == "spawn":
        session = make_suite({"test_wide_fixtures.py": "wide_fixtures.py"}).run(
            "--dcp-launch=spawn"
        )
    tests = [f"{name}[world_size={n}]" for n in (1, 2) for name in ("test_list", "test_list_again")]
    for test in [*tests, "test_own_parametrization[2-x]"]:
        assert session.outcomes(test) == PASSED


def test_a_wide_fixture_is_set_up_once_in_each_rank_of_a_warm_world(wide: SessionResult) -> None:
    made = Counter((n["scope"], n["size"], n["rank"]) for n in wide.noted("set up"))
    expected = [(scope, *of) for scope in ("session", "module") for of in ((1, 0), (2, 0), (2, 1))]
    assert made == dict.fromkeys(expected, 1)


def test_a_death_that_did_not_come_fails_its_own_test(wide: SessionResult) -> None:
    report = wide.bad("test_kill_at_is_judged_at_the_end_of_its_test")
    assert report.when == "teardown"
    assert "world.kill(1, at='json:load'): entered 0 times, expected 1" in report.text


def test_a_missing_fixture_is_an_error_of_its_test_alone(fixtures: SessionResult) -> None:
    report = fixtures.bad("test_missing_fixture")
    assert fixtures.outcomes("test_missing_fixture") == SETUP_ERROR
    assert report.headline == "ranks 0-1: fixture 'nonesuch' not found"
    assert "\nE       fixture 'nonesuch' not found\n>       available fixtures: " in report.text
    assert re.search(r"^/.*test_fixtures\.py:\d+$", report.text.splitlines()[-1])
    assert "INTERNALERROR" not in fixtures.output


def test_an_async_test_fails_as_pytest_has_it(fixtures: SessionResult) -> None:
    assert fixtures.outcomes("test_async") == FAILED
    assert "async def functions are not natively supported" in fixtures.bad("test_async").headline


# Folders and GPUs.

NO_GPUS = [
    ("test_nccl", "expected 3 GPUs or more, got 0 visible to this process"),
    ("test_gloo_on_cuda", "expected 1 GPUs or more, got 0 visible to this process"),
]
"""NCCL wants a GPU for each rank, gloo one for all."""


@pytest.fixture(scope="module")
def all_policy(fixtures: SessionResult) -> SessionResult:
    return fixtures


@pytest.fixture(scope="module")
def failed_policy(make_suite: MakeSuite) -> SessionResult:
    """Only folders of failed tests are kept; and missing GPUs are failures."""
    files = {"test_retention.py": "retention.py", "test_gpus.py": "gpus.py"}
    suite = make_suite(files, "tmp_path_retention_policy = failed")
    return suite.run("--dcp-require-gpus", env={"CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="module")
def none_policy(make_suite: MakeSuite) -> SessionResult:
    files = {"test_retention.py": "retention.py"}
    return make_suite(files, "tmp_path_retention_policy = none").run()


def kept(session: SessionResult, fixture: str) -> set[str]:
    """The verdicts of the tests whose folders are still there."""
    noted = [note for note in session.noted("folder") if note["fixture"] == fixture]
    assert len(noted) == 4
    assert all(note["empty"] for note in noted)
    return {note["verdict"] for note in noted if Path(note["path"]).exists()}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("all", {"passes", "fails"}), ("failed", {"fails"}), ("none", set())],
)
def test_checkpoint_dir_obeys_the_retention_policy(
    request: pytest.FixtureRequest, policy: str, expected: set[str]
) -> None:
    session = request.getfixturevalue(f"{policy}_policy")
    assert kept(session, "checkpoint_dir") == expected


@pytest.mark.parametrize(
    ("policy", "expected"), [("all", {"passes", "fails"}), ("failed", {"fails"})]
)
def test_tmp_path_of_ranks_obeys_the_retention_policy(
    request: pytest.FixtureRequest, policy: str, expected: set[str]
) -> None:
    assert kept(request.getfixturevalue(f"{policy}_policy"), "tmp_path") == expected


def test_checkpoint_dir_is_the_same_in_all_ranks_and_new_for_each_test(
    all_policy: SessionResult,
) -> None:
    noted = [n for n in all_policy.noted("folder") if n["fixture"] == "checkpoint_dir"]
    folders = Counter((note["verdict"], note["path"]) for note in noted)
    assert sorted(folders.values()) == [2, 2]
    assert len({path for _, path in folders}) == 2
    for _, path in folders:
        assert sorted(os.listdir(path)) == ["of rank 0", "of rank 1"]


@pytest.mark.parametrize(("test", "reason"), NO_GPUS)
def test_a_world_without_its_gpus_is_skipped_with_the_reason(
    fixtures: SessionResult, test: str, reason: str
) -> None:
    assert fixtures.outcomes(test) == {"setup": "skipped"}
    assert fixtures.outcomes("test_gloo") == PASSED
    assert re.search(rf"^SKIPPED \[1\] test_gpus\.py:\d+: {reason}", fixtures.output, re.M)


@pytest.mark.parametrize(("test", "reason"), NO_GPUS)
def test_a_world_without_its_gpus_fails_when_they_are_required(
    failed_policy: SessionResult, test: str, reason: str
) -> None:
    assert failed_policy.outcomes(test) == SETUP_ERROR
    assert failed_policy.outcomes("test_gloo") == PASSED
    assert re.match(f"--dcp-require-gpus: {reason}", failed_policy.bad(test).text)


# Leases.

BUDGET = 4


@pytest.fixture(scope="module")
def sharing(
    make_suite: MakeSuite, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SessionResult, SessionResult]:
    """Two sessions at a time, one of them with two workers, in one temporary folder."""
    suites = [make_suite({"test_sharing.py": "sharing.py"}) for _ in range(2)]
    env = {"TMPDIR": str(tmp_path_factory.mktemp("shared"))}
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(suite.run, workers, f"--dcp-max-procs={BUDGET}", env=env)
            for suite, workers in zip(suites, ("-n0", "-n2"), strict=True)
        ]
        return runs[0].result(), runs[1].result()


def alive(lives: Iterable[Mapping[str, Any]]) -> list[int]:
    """How many lived at a time, after each birth and death."""
    events = [(life["start_s"], 1) for life in lives] + [(life["stop_s"], -1) for life in lives]
    return [*accumulate(change for _, change in sorted(events))]


def test_sessions_that_share_a_machine_keep_to_one_budget(
    sharing: tuple[SessionResult, SessionResult],
) -> None:
    lives = [life for session in sharing for life in session.noted("life")]
    assert len(lives) == 2 * (6 * 2 + 2 * 3)
    assert max(alive(lives)) <= BUDGET


def test_the_shared_budget_is_used(sharing: tuple[SessionResult, SessionResult]) -> None:
    lives = [life for session in sharing for life in session.noted("life")]
    assert BUDGET in alive(lives)


def test_no_world_is_lost_to_its_neighbours(sharing: tuple[SessionResult, SessionResult]) -> None:
    for session in sharing:
        assert session.exit_code == pytest.ExitCode.OK
        assert session.left_running == ()
