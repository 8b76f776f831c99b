"""The supervisor: failures, the grace of the peers, and time limits."""

from __future__ import annotations

from pytest_dcp._harness.protocol.messages import Exchange
from pytest_dcp._harness.world.rank_states import Dump, KillRank
from pytest_dcp._harness.world.timers import STACKS_S
from support.supervisor_replay import (
    DYING_S,
    FAILED,
    GRACE_S,
    PASSED,
    T0,
    Replay,
    Says,
    make_result,
)


def test_after_a_failure_peers_get_the_grace_then_their_stacks_are_taken_then_they_are_killed() -> (
    None
):
    replay = Replay.calling(3)
    replay.play([(T0 + 2, Says(1, FAILED))])
    dumped = T0 + 2 + GRACE_S
    killed = dumped + STACKS_S
    assert replay.log == [
        (dumped, Dump(0)),
        (dumped, Dump(2)),
        (killed, KillRank(0)),
        (killed, KillRank(2)),
    ]
    assert replay.failures == [(1, "failed"), (0, "blocked"), (2, "blocked")]
    assert replay.now == killed + DYING_S
    assert replay.supervisor.idle == [1]
    assert not replay.supervisor.all_ranks_alive


def test_a_failure_keeps_the_rank_s_own_time_and_a_kill_has_the_controller_s() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Says(1, FAILED))])
    times = {f.rank: f.at_s for f in replay.supervisor.failures}
    assert times == {1: 99.5, 0: T0 + 2 + GRACE_S + STACKS_S}
    assert replay.summary(1) == "ValueError: 3"


def test_a_peer_that_ends_within_the_grace_is_left_alone() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Says(1, FAILED)), (T0 + 2.75, Says(0, PASSED))])
    assert replay.log == []
    assert replay.failures == [(1, "failed")]
    assert set(replay.supervisor.results) == {0, 1}


def test_a_peer_that_ends_while_its_stacks_are_taken_is_left_alone() -> None:
    replay = Replay.calling(3)
    dumped = T0 + 2 + GRACE_S
    replay.play([(T0 + 2, Says(1, FAILED)), (dumped + STACKS_S / 2, Says(0, PASSED))])
    assert replay.ordered(Dump) == [(dumped, 0), (dumped, 2)]
    assert replay.ordered(KillRank) == [(dumped + STACKS_S, 2)]


def test_a_second_failure_does_not_prolong_the_grace_of_the_first() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 2, Says(1, FAILED)), (T0 + 2.75, Says(2, FAILED))])
    assert replay.ordered(Dump) == [(T0 + 2 + GRACE_S, 0)]


def test_without_grace_the_stacks_are_taken_at_once() -> None:
    replay = Replay.calling(2, grace_s=0.0)
    replay.play([(T0 + 2, Says(1, FAILED))])
    assert replay.log == [(T0 + 2, Dump(0)), (T0 + 2 + STACKS_S, KillRank(0))]


def test_ranks_that_run_at_the_limit_are_dumped_and_killed_and_the_others_are_not() -> None:
    replay = Replay.calling(3, limit_s=10.0)
    replay.play([(T0 + 1, Says(1, PASSED))])
    assert replay.log == [
        (T0 + 10, Dump(0)),
        (T0 + 10, Dump(2)),
        (T0 + 10 + STACKS_S, KillRank(0)),
        (T0 + 10 + STACKS_S, KillRank(2)),
    ]
    assert replay.failures == [(0, "timeout"), (2, "timeout")]
    assert replay.supervisor.idle == [1]


def test_a_rank_that_waits_at_an_exchange_at_the_limit_is_a_timeout_too() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Says(1, Exchange("barrier()")))])
    assert sorted(replay.failures) == [(0, "timeout"), (1, "timeout")]
    assert sorted(replay.ordered(KillRank)) == [(T0 + 10 + STACKS_S, 0), (T0 + 10 + STACKS_S, 1)]


def test_a_limit_that_falls_into_the_grace_ends_it() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 9.75, Says(1, FAILED))])
    assert replay.log == [(T0 + 10, Dump(0)), (T0 + 10 + STACKS_S, KillRank(0))]
    assert replay.failures[0] == (1, "failed")


def test_a_world_that_does_not_come_up_ends_at_the_limit_of_its_boot() -> None:
    replay = Replay(2)
    replay.supervisor.boot(T0 + 120.0)
    replay.play([(T0 + 1, Says(0, make_result("boot")))])
    assert replay.failures == [(1, "timeout")]
    assert replay.ordered(KillRank) == [(T0 + 120.0 + STACKS_S, 1)]


def test_a_late_tick_still_gives_a_rank_the_time_to_write_its_stacks() -> None:
    # The controller itself was stopped, or slept through the limit.
    replay = Replay.calling(1, limit_s=10.0)
    assert replay.supervisor.tick(T0 + 500) == [Dump(0)]
    assert replay.supervisor.tick(T0 + 500 + STACKS_S / 2) == []
    assert replay.supervisor.tick(T0 + 500 + STACKS_S) == [KillRank(0)]


def test_after_the_limit_the_supervisor_sleeps_until_the_kill() -> None:
    # Woken in the past, the world's loop would spin while the ranks need the core for their stacks.
    replay = Replay.calling(1, limit_s=10.0)
    assert replay.supervisor.wake_at() == T0 + 10
    replay.supervisor.tick(T0 + 10)
    assert replay.supervisor.wake_at() == T0 + 10 + STACKS_S
