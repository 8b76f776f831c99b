"""The report of a test's injections at its end, in whole sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    return make_suite({"test_injections.py": "injections.py"}).run()


@pytest.mark.parametrize("test", ["test_alone_never_fires", "test_in_a_world_never_fires"])
def test_an_injection_that_never_fired_fails_the_test(session: SessionResult, test: str) -> None:
    bad = session.bad(test)
    assert bad.when == "teardown"
    assert "on='write'" in bad.text
    assert "never fired" in bad.text


@pytest.mark.parametrize(
    "test",
    [
        "test_in_one_rank_fires",
        "test_alone_is_not_to_fire",
        "test_hangs_to_the_end",
        "test_nothing_hangs_any_more",
    ],
)
def test_injections_that_did_their_part_pass(session: SessionResult, test: str) -> None:
    assert set(session.outcomes(test).values()) == {"passed"}


@pytest.mark.parametrize("test", ["test_alone_fails_by_itself", "test_in_a_world_fails_by_itself"])
def test_a_test_that_failed_by_itself_is_not_blamed_twice(
    session: SessionResult, test: str
) -> None:
    bad = session.bad(test)
    assert bad.when == "call"
    assert "boom" in bad.text
    assert session.outcomes(test) == {"call": "failed"}


@pytest.mark.parametrize("crash", ["kill-0123456789", "posix-0123456789"])
def test_a_test_that_tries_no_state_of_the_id_to_replay_is_skipped(
    make_suite: MakeSuite, crash: str
) -> None:
    session = make_suite({"test_replayed.py": "replayed.py"}).run(f"--dcp-fault-replay={crash}")
    for test in ("test_alone", "test_in_one_rank"):
        assert session.outcomes(test)["teardown"] == "skipped"
    # The ranks end together also where one of them has failed.
    assert session.outcomes("test_one_rank_fails") == {"call": "failed", "teardown": "skipped"}
