"""Worlds whose ranks are not processes: views of fake worlds, and threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult


@pytest.fixture(scope="module")
def views(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_fake_worlds.py": "fake_worlds.py"}).run()


@pytest.mark.parametrize(
    "test",
    [
        "test_rank_0_is_the_view_by_default",
        "test_each_view_holds_its_part[rank=0]",
        "test_each_view_holds_its_part[rank=513]",
        "test_sizes_and_views_multiply[rank=3-world_size=16]",
        "test_sizes_and_views_multiply[rank=3-world_size=131072]",
        "test_a_parametrization_chooses_views[1]",
        "test_a_parametrization_chooses_views[2]",
    ],
)
def test_a_view_passes(views: SessionResult, test: str) -> None:
    assert views.outcomes(test)["call"] == "passed"


def test_each_view_is_a_test_of_its_own(views: SessionResult) -> None:
    names = [name.partition("::")[2] for name in views.collected]
    found = [name for name in names if name.startswith("test_each_view")]
    assert found == [f"test_each_view_holds_its_part[rank={rank}]" for rank in (0, 513)]


def test_a_failure_in_a_view_fails_its_test(views: SessionResult) -> None:
    report = views.bad("test_a_failure_names_the_view[rank=2]")
    assert report.category == "failed"
    assert "assert 2 == 0" in report.text


def test_ranks_that_cannot_meet_are_refused_in_one_sentence(views: SessionResult) -> None:
    report = views.bad("test_the_world_fixture_has_no_peers[rank=2]")
    assert report.category == "error"
    assert "in a world with backend='fake' there is one, and no other to meet" in report.text
    report = views.bad("test_real_ranks_only")
    assert "worlds(...) starts processes; backend='fake' is for the marker" in report.text


def test_wrong_markers_are_refused_before_any_test(make_suite: MakeSuite) -> None:
    source = (
        "import pytest\n"
        "@pytest.mark.world_size(4, backend='fake', ranks=[0, 7])\n"
        "def test_outside(): pass\n"
        "@pytest.mark.world_size(4, ranks=[0])\n"
        "def test_of_real_ranks(): pass\n"
        "@pytest.mark.world_size(4, backend='pretend')\n"
        "def test_of_no_backend(): pass\n"
    )
    suite = make_suite({})
    (suite.folder / "test_wrong.py").write_text(source)
    result = suite.run()
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    for words in (
        "has no rank 7: its ranks are 0 to 3",
        "ranks= chooses views of a world with backend='fake'",
        "backend= takes one of auto, gloo, nccl, fake, threaded; got 'pretend'",
    ):
        assert words in result.output


# Threads.


@pytest.fixture(scope="module")
def threads(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_threads.py": "threaded_worlds.py"}).run()


@pytest.mark.parametrize(
    "test",
    [
        "test_collectives_meet",
        "test_the_mesh_is_that_of_the_marker",
        *(
            f"test_a_checkpoint_of_threads[world_size={size}-{cut}]"
            for size in (2, 3)
            for cut in (0, 1)
        ),
    ],
)
def test_ranks_in_threads_pass(threads: SessionResult, test: str) -> None:
    assert threads.outcomes(test)["call"] == "passed"


def test_the_cause_in_one_thread_is_the_failure(threads: SessionResult) -> None:
    report = threads.bad("test_one_fails_while_others_wait")
    assert "ValueError: the cause" in report.text
    assert "in the thread of rank 1 of 3" in report.text
    assert "SystemExit" not in report.text


def test_a_thread_that_does_not_end_is_left_behind(threads: SessionResult) -> None:
    report = threads.bad("test_one_fails_while_another_sleeps")
    assert "ValueError: the cause" in report.text
    assert "rank 2 still waited 2 s later" in report.text
    assert threads.elapsed_s < 60


def test_threads_skip_together_or_fail(threads: SessionResult) -> None:
    assert threads.outcomes("test_all_skip")["call"] == "skipped"
    assert threads.outcomes("test_expected_to_fail")["call"] == "xfailed"
    report = threads.bad("test_some_skip")
    assert "rank 1 skipped, and the others did not" in report.text


def test_threads_have_no_world_fixture(threads: SessionResult) -> None:
    report = threads.bad("test_no_world")
    assert "in a world with backend='threaded' there is one" in report.text


def test_tests_that_cannot_run_in_threads_are_refused(make_suite: MakeSuite) -> None:
    result = make_suite({"test_refused.py": "threaded_refusals.py"}).run()
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    for words in (
        "cannot run a property: Hypothesis draws in one thread",
        "is for test functions, not for methods of a TestCase",
        "takes a size from 1 to 64; got 65",
    ):
        assert words in result.output
