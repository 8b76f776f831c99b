"""Worlds whose ranks do not exist: one process runs one rank's view. One session, many tests."""

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
    report = views.bad("test_the_world_fixture_has_nobody_to_meet[rank=2]")
    assert report.category == "error"
    assert "in a world with backend='fake' there is one, and no other to meet" in report.text
    report = views.bad("test_real_ranks_only")
    assert "a fake world is for the marker: world_size(4, backend='fake')" in report.text


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
        "backend= takes one of auto, gloo, nccl, fake; got 'pretend'",
    ):
        assert words in result.output
