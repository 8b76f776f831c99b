"""Tests that attack the harness itself: each is refused in words or harmless, and none passes.

One session runs them all. A rank's own process may do as it likes, also to its own verdict; no
other process speaks for it, and no attack runs code in the controller or lasts longer than a test.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
from test_never_a_false_pass import FAILED, PASSED, TEARDOWN_ERROR, Case, each

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

REFUSED = "rank 1: data on its report socket in call is refused: "
BY_HAND = "rank 1: ended call while in teardown: was the message written by hand\\?$"

ATTACKS = (
    Case("test_garbage", FAILED, REFUSED),
    Case("test_garbage_and_passes", FAILED, f"{REFUSED}a frame claims [0-9]+ bytes$"),
    Case("test_truncated_message", FAILED, f"{REFUSED}not"),
    Case("test_claims_all_memory", FAILED, f"{REFUSED}a frame claims 8589934590 bytes$"),
    Case("test_claims_much_and_passes", FAILED, f"{REFUSED}not the beginning of a message: "),
    Case("test_pickle_in_the_place_of_a_message", FAILED, f"{REFUSED}not the beginning of"),
    Case(
        "test_message_of_the_controller",
        FAILED,
        f"{REFUSED}a Leave, which only the controller sends$",
    ),
    Case("test_time_that_is_none", FAILED, f"{REFUSED}.*expected a number, got 'now'$"),
    Case(
        "test_kills_a_rank_that_is_not_there",
        FAILED,
        "rank 1: asked to kill rank 99 of a world of 2$",
    ),
    Case("test_stops_the_clock", FAILED, "rank 1: sent At while in call: "),
    Case(
        "test_floods", FAILED, "rank 1: (sent Exchange while|took nothing from its report socket)"
    ),
    Case(
        "test_peer_gives_all_verdicts_of_a_rank_that_dies",
        FAILED,
        rf"{REFUSED}process \d+ \(.*\) wrote to the report socket of the rank",
    ),
    Case(
        "test_peer_gives_the_verdict_of_a_rank_that_fails",
        FAILED,
        rf"{REFUSED}process \d+ \(.*\) wrote to the report socket of the rank",
    ),
    Case(
        "test_child_gives_all_verdicts_of_a_rank_that_dies",
        FAILED,
        rf"{REFUSED}process \d+ \(.*\) wrote to the report socket of the rank",
    ),
    Case(
        "test_gives_the_verdict_of_its_teardown_and_fails",
        FAILED,
        "rank 1: ended teardown while in call: was the message written by hand\\?$",
    ),
    Case(
        "test_report_of_no_subtest[empty]",
        FAILED,
        "WorldError: rank 1 sent something other than a report of a subtest of ",
    ),
    Case(
        "test_report_of_no_subtest[bare]",
        FAILED,
        "WorldError: rank 1 sent something other than a report",
    ),
    Case(
        "test_report_of_no_subtest[of another test]",
        FAILED,
        "WorldError: rank 1 sent something other than a report",
    ),
    Case("test_closes_all_descriptors", FAILED, "rank 1: (was killed|exited|closed) "),
    Case("test_puts_null_over_all_descriptors", FAILED, "rank 1: (was killed|exited|closed) "),
    Case("test_puts_a_socket_over_its_own", FAILED, "rank 1: (closed|exited with code 1) "),
    Case("test_child_keeps_the_socket", PASSED),
    Case(
        "test_child_keeps_the_socket_that_its_rank_closes",
        FAILED,
        "rank 1: (exited with code 1|closed its report socket) in call",
    ),
    Case("test_shuts_the_socket_down", FAILED, "rank 1: (exited|closed) "),
    Case("test_its_output_is_huge", FAILED, "rank 1: printed 4398046511104 bytes in call"),
    Case("test_its_stacks_are_huge", FAILED, "rank 1: still in call at the time limit of 2 s"),
    Case("test_record_is_huge", FAILED, "rank 1: ValueError: boom$"),
    Case("test_pickle_in_a_peers_record", FAILED, "rank 1: ValueError: boom$"),
    Case("test_has_a_module_of_its_own_preloaded", PASSED),
    Case(
        "test_sends_garbage_for_its_plugins",
        TEARDOWN_ERROR,
        "WorldError: data gathered by plugins in the process of rank 1 cannot be unpickled here: ",
    ),
    Case("test_removes_the_folder_of_the_session", PASSED),
    Case("test_takes_the_names_of_coming_stores", PASSED),
    Case("test_another_user_finds_no_way_in", PASSED),
    Case("test_another_user_connects_to_gloo_first", PASSED),
    Case("test_another_user_listens_on_the_master_port", FAILED, "ranks? 0.*EADDRINUSE"),
    Case("test_passes_in_the_end", PASSED),
    Case(
        "test_stops_the_parent_of_the_ranks",
        FAILED,
        r"ranks 0-1: the zygote \(process \d+\), .* was stopped by a signal; it was killed",
    ),
)
BY_HAND_CASES = (
    "test_gives_its_verdict_by_hand_and_fails",
    "test_gives_its_verdict_by_hand_and_dies",
)
"""In time or not, the verdict comes before the end that shows it to be false."""
OF_OTHERS = ("test_another_user_finds_no_way_in", "test_another_user_listens_on_the_master_port")


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    """The session in which all attacks ran."""
    return make_suite({"test_attacks.py": "attacks.py"}, ini="dcp_grace = 0.3").run()


@each(ATTACKS)
def test_an_attack_is_refused_in_words_or_harmless(session: SessionResult, case: Case) -> None:
    if case.test in OF_OTHERS and os.getuid() != 0:
        pytest.skip("only root can become another user")
    assert session.outcomes(case.test) == case.outcomes
    if case.headline:
        assert re.search(case.headline, session.bad(case.test).headline)


@pytest.mark.parametrize("test", BY_HAND_CASES)
def test_a_verdict_by_hand_hides_no_failure(session: SessionResult, test: str) -> None:
    # The order to tear down may arrive before the failure or after: either phase may report it.
    assert {"failed", "error"} & {*session.outcomes(test).values()}
    assert re.match("rank 1: (ended call|sent At|exited with code 0)", session.bad(test).headline)


def test_no_attack_runs_code_outside_of_its_rank(session: SessionResult) -> None:
    notes = session.noted("canary")
    assert len(notes) == 2
    assert not any(one["found"] or one["module"] for one in notes)
    assert not (session.folder / "canary").exists()


def test_no_test_is_reported_that_was_not_collected(session: SessionResult) -> None:
    assert {report.nodeid for report in session.reports} == set(session.collected)
    assert not any(report.subtest for report in session.reports)


def test_every_attack_is_looked_at_here(session: SessionResult) -> None:
    looked_at = {case.test for case in ATTACKS} | {*BY_HAND_CASES}
    assert {nodeid.rpartition("::")[2] for nodeid in session.collected} == looked_at


def test_no_attacker_is_left_running(session: SessionResult) -> None:
    assert session.left_running == ()
    assert session.left_in_tmpdir == ()
