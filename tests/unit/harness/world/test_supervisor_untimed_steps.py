"""The supervisor: steps that no limit counts: imports, collection, reports."""

from __future__ import annotations

import pytest

from pytest_dcp._harness.protocol.messages import At, Exchange, Met
from pytest_dcp._harness.protocol.places import PREPARE_S, REPORT_S
from pytest_dcp._harness.world.rank_states import Dump, KillRank
from pytest_dcp._harness.world.timers import STACKS_S
from support.supervisor_replay import (
    FAILED,
    GRACE_S,
    LIMIT_S,
    PASSED,
    T0,
    Ends,
    Replay,
    Says,
    debugged,
    make_result,
)

IMPORTING = At("preparing", "importing torch")
READY = At("ready")
REPORTING = At("reporting", "ValueError: 3", 99.5)


def booting(size: int = 2) -> Replay:
    """A world of spawned ranks."""
    replay = Replay(size)
    replay.supervisor.boot(T0 + 120.0, T0, "starting Python")
    return replay


def test_the_limit_of_the_boot_counts_from_when_all_ranks_have_imported_torch() -> None:
    replay = booting()
    slow = [(T0 + 50, Says(0, IMPORTING)), (T0 + 60, Says(1, IMPORTING))]
    ready = [(T0 + 70, Says(1, READY)), (T0 + 500, Says(0, READY))]
    replay.play([*slow, *ready, *((T0 + 619, Says(rank, make_result("boot"))) for rank in (0, 1))])
    assert (replay.failures, replay.ordered(Dump)) == ([], [])


def test_a_boot_that_is_late_after_the_imports_failed() -> None:
    replay = booting()
    replay.play([(T0 + 500, Says(rank, READY)) for rank in (0, 1)])
    assert replay.failures == [(0, "timeout"), (1, "timeout")]
    assert replay.ordered(KillRank)[0][0] == T0 + 500 + 120 + STACKS_S
    assert replay.summary(0) == "still in boot"
    assert not replay.supervisor.prepared_too_long


def test_a_rank_that_imports_without_end_is_killed_and_the_report_names_the_import() -> None:
    replay = booting()
    replay.play([(T0 + 1, Says(0, IMPORTING)), (T0 + 2, Says(1, READY))])
    assert replay.failures == [(0, "timeout"), (1, "timeout")]
    assert replay.ordered(KillRank)[0][0] == T0 + PREPARE_S + STACKS_S
    assert (replay.summary(0), replay.summary(1)) == ("still importing torch", "still in boot")
    assert replay.supervisor.prepared_too_long


def test_a_rank_that_dies_while_it_imports_starts_the_clock() -> None:
    replay = booting()
    replay.play([(T0 + 1, Says(1, READY)), (T0 + 400, Ends(0, 1))])
    assert replay.failures == [(0, "crashed"), (1, "blocked")]


def test_the_limit_of_a_phase_stands_still_while_a_rank_collects() -> None:
    replay = Replay.ready(2)
    replay.begin(range(2), "setup")
    replay.log.clear()
    collecting = At("preparing", "collecting the test")
    said = [(T0 + 1, Says(0, collecting)), (T0 + 301, Says(0, READY))]
    replay.play([*said, (T0 + 302, Says(0, make_result("setup")))])
    assert replay.failures == [(1, "timeout")]
    assert replay.ordered(Dump) == [(T0 + LIMIT_S + 300, 1)]


def test_a_rank_that_reports_its_failure_is_not_killed_for_its_peer_s() -> None:
    replay = Replay.calling(3)
    said = [(T0 + 1, Says(0, FAILED)), (T0 + 1, Says(1, REPORTING)), (T0 + 9, Says(1, FAILED))]
    replay.play(said)
    assert replay.failures == [(0, "failed"), (2, "blocked"), (1, "failed")]
    assert replay.ordered(KillRank) == [(T0 + 1 + GRACE_S + STACKS_S, 2)]
    assert replay.ordered(Dump) == [(T0 + 1 + GRACE_S, 2)]


def test_a_rank_that_reports_its_failure_may_do_so_beyond_the_time_limit() -> None:
    replay = Replay.calling(2)
    reporting = [(T0 + LIMIT_S - 1, Says(1, REPORTING)), (T0 + LIMIT_S + 9, Says(1, FAILED))]
    replay.play(reporting)
    assert replay.failures == [(0, "timeout"), (1, "failed")]
    assert replay.ordered(KillRank) == [(T0 + LIMIT_S + STACKS_S, 0)]


@pytest.mark.parametrize("since", [1, LIMIT_S - 1])
def test_a_report_without_end_is_cut_off_and_its_exception_is_reported(since: float) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILED)), (T0 + since, Says(1, REPORTING))])
    if since > 1:  # too late: killed as a peer of the first
        assert replay.failures == [(0, "failed"), (1, "blocked")]
        return
    assert replay.failures == [(0, "failed"), (1, "failed")]
    assert replay.ordered(KillRank) == [(T0 + since + REPORT_S + STACKS_S, 1)]
    assert replay.summary(1).startswith("ValueError: 3 (killed: it wrote the report of that for ")
    assert [f.at_s for f in replay.supervisor.failures if f.rank == 1] == [99.5]


def test_a_report_without_end_of_the_only_failure_is_ended() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, REPORTING)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "failed")]
    assert replay.ordered(KillRank) == [(T0 + LIMIT_S + STACKS_S, 1)]


def test_a_rank_that_dies_while_it_reports_its_failure_is_reported_with_it() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 1, Says(0, REPORTING)), (T0 + 2, Ends(0, -11))])
    assert replay.summary(0) == (
        "was killed by signal 11 (SIGSEGV) in call, without a verdict; it had raised ValueError: 3"
    )


def test_a_rank_that_waits_for_its_peers_while_it_reports_is_one_that_waits() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 1, Says(0, REPORTING)),
            (T0 + 1, Says(0, Exchange("barrier()"))),
            (T0 + 1, Says(1, make_result(outcome="exit"))),
        ]
    )
    assert isinstance(replay.sent(0)[0], Met)


def test_the_time_for_a_report_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2)
    said = [(T0 + 1, Says(0, FAILED)), (T0 + 1, Says(1, REPORTING)), *debugged(1.5, 900, 1)]
    replay.play([*said, (T0 + 910, Says(1, FAILED))])
    assert replay.failures == [(0, "failed"), (1, "failed")]
    assert replay.ordered(KillRank) == []


def test_the_next_phase_forgets_where_ranks_were() -> None:
    replay = Replay.calling(2)
    replay.play(
        [(T0 + 1, Says(0, REPORTING)), (T0 + 2, Says(0, FAILED)), (T0 + 2, Says(1, FAILED))]
    )
    replay.begin([0, 1], "teardown", limit_s=5.0)
    replay.play([])
    assert replay.failures == [(0, "timeout"), (1, "timeout")]
