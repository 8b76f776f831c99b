"""The supervisor against replayed histories: a fake clock, fake processes, every order recorded.

A history says what ranks do and when. `Replay` is the world around the supervisor: it wakes it when
it asks to be woken, carries out its kills on processes that end a little later, and keeps what was
ordered, with the time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_dcp._harness.protocol.messages import (
    Announce,
    At,
    DebugAnswer,
    DebugAsk,
    DebugDone,
    Done,
    Down,
    Exchange,
    FaultAct,
    FaultAnswer,
    FaultAsk,
    Go,
    Leave,
    Met,
    Phase,
    Place,
    RankOutcome,
    SubReport,
    Up,
)
from pytest_dcp._harness.protocol.places import FAILING_S, PREPARE_S, REPORT_S
from pytest_dcp._harness.world.interrupt_clock import AGAIN_S, END_S, HEED_S
from pytest_dcp._harness.world.rank_states import (
    Action,
    Continue,
    Dump,
    Interrupt,
    KillRank,
    Send,
    StopRank,
    exit_text,
)
from pytest_dcp._harness.world.requested_deaths import OWED_S
from pytest_dcp._harness.world.supervisor import (
    CLOSED_S,
    EXITING_S,
    LOST_S,
    STACKS_S,
    Supervisor,
    Terminal,
)

T0 = 100.0
"""When phases begin."""
GRACE_S = 1.0
LIMIT_S = 60.0
DYING_S = 0.015625
"""From a kill to the process's end; a power of two, so that times in logs are exact."""


@dataclass(frozen=True, slots=True)
class Says:
    rank: int
    message: Up


@dataclass(frozen=True, slots=True)
class Ends:
    rank: int
    status: int


@dataclass(frozen=True, slots=True)
class Closes:
    rank: int
    exiting: bool = False


@dataclass(frozen=True, slots=True)
class Floods:
    rank: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Halts:
    """Its process is stopped, or goes on."""

    rank: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class Strikes:
    """The test asks for it, from outside."""

    act: FaultAct
    rank: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The session is: the phase is cut off."""


@dataclass(frozen=True, slots=True)
class SeenAtWork:
    rank: int


Event = Says | Ends | Closes | Floods | Halts | Strikes | Interrupted | SeenAtWork


def hand_over(supervisor: Supervisor, event: Event, now: float) -> list[Action]:
    """Tell the supervisor, as `world.World` does."""
    match event:
        case Says(rank, message):
            return supervisor.heard(rank, message, now)
        case Ends(rank, status):
            return supervisor.exited(rank, status, now)
        case Closes(rank, exiting):
            return supervisor.closed(rank, now, exiting=exiting)
        case Floods(rank, size_bytes):
            return supervisor.flooded(rank, size_bytes, now)
        case Halts(rank, stopped):
            return supervisor.halted(rank, now, stopped=stopped)
        case Strikes(act, rank):
            return supervisor.strike(act, rank, f"{act}({rank}) by the test", now)
        case Interrupted():
            return supervisor.cut_off(now)
        case SeenAtWork(rank):
            supervisor.see_work(rank, now)
            return []


class Replay:
    """A world of fake processes on a fake clock."""

    def __init__(
        self,
        size: int = 2,
        *,
        grace_s: float = GRACE_S,
        terminal: Terminal | None = None,
        unkillable: Iterable[int] = (),
    ) -> None:
        self.supervisor = Supervisor(size, grace_s=grace_s, terminal=terminal or Terminal())
        self.now = T0
        self.log: list[tuple[float, Action]] = []
        self._unkillable = frozenset(unkillable)
        self._coming: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._woken, self._wakings = -math.inf, 0

    @classmethod
    def ready(cls, size: int = 2, **keywords: object) -> Replay:
        """A world whose ranks have come up and wait for orders."""
        replay = cls(size, **keywords)  # type: ignore[arg-type]  # passed on
        replay.supervisor.boot(T0 + 120.0)
        replay.play([(T0, Says(rank, done("boot"))) for rank in range(size)])
        assert replay.supervisor.settled
        return replay

    @classmethod
    def calling(
        cls, size: int = 2, limit_s: float = LIMIT_S, order: Down | None = None, **keywords: object
    ) -> Replay:
        """A world in a phase that began at T0; the log starts empty."""
        replay = cls.ready(size, **keywords)
        replay.begin(range(size), limit_s=limit_s, order=order)
        replay.log.clear()
        return replay

    def begin(
        self,
        ranks: Iterable[int],
        phase: Phase = "call",
        limit_s: float = LIMIT_S,
        order: Down | None = None,
    ) -> None:
        orders = dict.fromkeys(ranks, order if order is not None else Go(phase))
        self._note(self.supervisor.begin(phase, orders, self.now + limit_s))

    def play(self, history: Iterable[tuple[float, Event]], until: float = math.inf) -> None:
        """Let a history happen, and time pass, until every rank is accounted for (or `until`)."""
        for at, event in history:
            self._push(at, event)
        while True:
            woken = self.supervisor.wake_at()
            coming = self._coming[0][0] if self._coming else math.inf
            if min(woken, coming) > until or (self.supervisor.settled and not self._coming):
                self.now = max(self.now, until if until < math.inf else self.now)
                return
            assert min(woken, coming) < math.inf, "the supervisor waits for ever"
            assert min(woken, coming) > self.now or not self._spins(), "the supervisor spins"
            self.now = max(self.now, min(woken, coming))
            while self._coming and self._coming[0][0] <= self.now:
                self._note(hand_over(self.supervisor, heapq.heappop(self._coming)[2], self.now))
            self._note(self.supervisor.tick(self.now))

    def _spins(self) -> bool:
        """Whether it is woken at one moment again and again."""
        self._wakings = 0 if self.now > self._woken else self._wakings + 1
        self._woken = self.now
        return self._wakings > 10

    def _push(self, at: float, event: Event) -> None:
        heapq.heappush(self._coming, (at, next(self._order), event))

    def _note(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self.log.append((self.now, action))
            if action.rank in self._unkillable:
                continue
            if isinstance(action, KillRank):
                self._push(self.now + DYING_S, Ends(action.rank, -signal.SIGKILL))
            elif isinstance(action, StopRank | Continue):
                stopped = isinstance(action, StopRank)
                self._push(self.now + DYING_S, Halts(action.rank, stopped))

    # What tests ask.

    def ordered(self, kind: type[Action]) -> list[tuple[float, int]]:
        """(time, rank) of the orders of one kind."""
        return [(at, action.rank) for at, action in self.log if isinstance(action, kind)]

    def sent(self, rank: int) -> list[Down]:
        return [a.message for _, a in self.log if isinstance(a, Send) and a.rank == rank]

    @property
    def failures(self) -> list[tuple[int, str]]:
        """(rank, kind), in the order in which they were found."""
        return [(f.rank, f.kind) for f in self.supervisor.failures]

    @property
    def lost(self) -> dict[int, str]:
        """Rank -> reason, of those that ended as asked."""
        return {rank: one.reason for rank, one in self.supervisor.deaths.lost.items()}

    def dismiss(self) -> None:
        """What the world does at the end of a phase."""
        assert self.supervisor.settled
        self._note(self.supervisor.dismiss(self.now))
        self.play([])

    def summary(self, rank: int) -> str:
        (text,) = [f.summary for f in self.supervisor.failures if f.rank == rank]
        return text


def done(phase: Phase = "call", outcome: RankOutcome = "passed", at_s: float = T0) -> Done:
    return Done(phase, outcome, at_s, text="ValueError: 3" if outcome == "failed" else "")


FAILED = done(outcome="failed", at_s=99.5)
PASSED = done()


# Phases that end well.


def test_a_world_comes_up_when_every_rank_said_so() -> None:
    replay = Replay(3)
    replay.supervisor.boot(T0 + 120.0)
    replay.play([(T0 + 1, Says(0, done("boot"))), (T0 + 2, Says(2, done("boot")))], until=T0 + 9)
    assert not replay.supervisor.settled
    assert replay.supervisor.busy == [1]
    replay.play([(T0 + 10, Says(1, done("boot")))])
    assert replay.supervisor.busy == []
    assert replay.supervisor.whole
    assert replay.supervisor.idle == [0, 1, 2]
    assert replay.log == []


def test_a_phase_sends_its_order_to_every_rank_and_settles_when_all_are_done() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], order=Go("call"))
    assert replay.log == [(T0, Send(0, Go("call"))), (T0, Send(1, Go("call")))]
    replay.play([(T0 + 1, Says(1, PASSED)), (T0 + 2, Says(0, PASSED))])
    assert replay.supervisor.done == {0: PASSED, 1: PASSED}
    assert replay.failures == []
    assert replay.supervisor.whole
    assert replay.supervisor.wake_at() == math.inf
    assert len(replay.log) == 2


def test_phases_follow_each_other_and_the_second_forgets_the_first() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILED)), (T0 + 1, Says(1, PASSED))])
    assert replay.failures == [(0, "failed")]
    replay.begin([0, 1], "teardown")
    assert replay.supervisor.failures == []
    assert replay.supervisor.done == {}
    torn = done("teardown")
    replay.play([(T0 + 1.5, Says(0, torn)), (T0 + 9, Says(1, torn))])
    # The grace of the first phase's failure would have ended rank 1 at T0 + 2.
    assert replay.failures == []
    assert replay.ordered(KillRank) == []


@pytest.mark.parametrize("outcome", ["exit", "interrupt"])
def test_a_rank_that_stops_the_session_gives_its_peers_the_grace(outcome: RankOutcome) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, done(outcome=outcome)))])
    assert replay.failures == [(1, "blocked")]
    assert replay.ordered(KillRank) == [(T0 + 1 + GRACE_S + STACKS_S, 1)]


@pytest.mark.parametrize("outcome", ["skipped", "xfailed"])
def test_an_outcome_that_is_no_failure_starts_no_grace(outcome: RankOutcome) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, done(outcome=outcome))), (T0 + 30, Says(1, PASSED))])
    assert replay.failures == []
    assert replay.ordered(Dump) == []


# What is prepared, and what is reported, is not timed.

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
    replay.play([*slow, *ready, *((T0 + 619, Says(rank, done("boot"))) for rank in (0, 1))])
    assert (replay.failures, replay.ordered(Dump)) == ([], [])


def test_a_boot_that_is_late_after_the_imports_failed() -> None:
    replay = booting()
    replay.play([(T0 + 500, Says(rank, READY)) for rank in (0, 1)])
    assert replay.failures == [(0, "timeout"), (1, "timeout")]
    assert replay.ordered(KillRank)[0][0] == T0 + 500 + 120 + STACKS_S
    assert replay.summary(0) == "still in boot"
    assert not replay.supervisor.prepared_too_long


def test_a_rank_that_imports_without_end_is_killed_and_the_report_says_what_it_did() -> None:
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
    replay.play([*said, (T0 + 302, Says(0, done("setup")))])
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
def test_a_report_without_end_is_ended_and_what_it_is_of_is_told(since: float) -> None:
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


def test_a_rank_that_dies_while_it_reports_its_failure_is_told_with_it() -> None:
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
            (T0 + 1, Says(1, done(outcome="exit"))),
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


# Failures and limits.


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
    assert not replay.supervisor.whole


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
    assert set(replay.supervisor.done) == {0, 1}


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
    replay.play([(T0 + 1, Says(0, done("boot")))])
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


# Deaths.


@pytest.mark.parametrize(
    ("status", "how"), [(-signal.SIGSEGV, "SIGSEGV"), (3, "code 3"), (0, "code 0")]
)
def test_a_rank_that_dies_in_a_phase_is_a_crash_and_its_peers_get_the_grace(
    status: int, how: str
) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Ends(1, status))])
    assert replay.failures == [(1, "crashed"), (0, "blocked")]
    assert how in replay.summary(1)
    assert "call" in replay.summary(1)
    assert replay.log == [
        (T0 + 2 + GRACE_S, Dump(0)),
        (T0 + 2 + GRACE_S + STACKS_S, KillRank(0)),
    ]


def test_a_rank_that_dies_between_phases_fails_the_world_without_a_kill() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, PASSED)), (T0 + 1, Says(1, PASSED))])
    replay.play([(T0 + 2, Ends(1, -signal.SIGKILL))])
    assert replay.failures == [(1, "crashed")]
    assert "SIGKILL" in replay.summary(1)
    assert replay.supervisor.settled
    assert not replay.supervisor.whole
    assert replay.supervisor.idle == [0]
    assert replay.log == []


def test_a_rank_that_answers_and_dies_in_the_same_moment_keeps_its_answer() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, PASSED)), (T0 + 1, Ends(1, 1)), (T0 + 1.5, Says(0, PASSED))])
    assert replay.supervisor.done == {0: PASSED, 1: PASSED}
    assert replay.failures == [(1, "crashed")]


def test_a_closed_socket_is_named_by_the_exit_that_follows() -> None:
    replay = Replay.calling(2)
    exit_ = (T0 + 2 + CLOSED_S / 2, Ends(1, -signal.SIGABRT))
    replay.play([(T0 + 2, Closes(1)), exit_, (T0 + 2.5, Says(0, PASSED))])
    assert replay.failures == [(1, "crashed")]
    assert "SIGABRT" in replay.summary(1)
    assert replay.log == []


def test_a_rank_that_closes_its_socket_and_lives_is_killed() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Closes(1)), (T0 + 2.5, Says(0, PASSED))])
    assert replay.log == [(T0 + 2 + CLOSED_S, KillRank(1))]
    assert replay.failures == [(1, "closed")]


def test_a_second_end_of_the_socket_does_not_prolong_the_wait_for_the_exit() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 2, Closes(0)), (T0 + 2 + CLOSED_S / 2, Closes(0))])
    assert replay.ordered(KillRank) == [(T0 + 2 + CLOSED_S, 0)]


def test_a_rank_whose_socket_closes_between_phases_is_found_in_the_next() -> None:
    replay = Replay.ready(2)
    replay.play([(T0, Closes(1))], until=T0)
    replay.begin([0, 1])
    replay.play([(T0 + 0.125, Says(0, PASSED))])
    assert replay.failures == [(1, "closed")]
    assert replay.ordered(KillRank) == [(T0 + CLOSED_S, 1)]


def test_a_rank_that_prints_too_much_is_killed_at_once_and_named_with_the_size() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 2, Floods(1, 123456)), (T0 + 2.5, Floods(1, 999999))])
    assert replay.ordered(KillRank)[0] == (T0 + 2, 1)
    assert replay.failures == [(1, "flooded"), (0, "blocked")]
    assert "123456" in replay.summary(1)


def test_what_a_killed_rank_still_says_and_does_changes_nothing() -> None:
    replay = Replay.calling(2)
    late = T0 + 2 + DYING_S / 2
    replay.play(
        [
            (T0 + 2, Floods(1, 10)),
            (late, Says(1, PASSED)),
            (late, Says(1, Exchange("barrier()"))),
            (late, Closes(1)),
            (late, Floods(1, 11)),
            (T0 + 3, Says(1, PASSED)),
            (T0 + 3, Ends(1, 0)),
            (T0 + 2.5, Says(0, PASSED)),
        ]
    )
    assert replay.failures == [(1, "flooded")]
    assert set(replay.supervisor.done) == {0}
    assert replay.log == [(T0 + 2, KillRank(1))]


def test_a_rank_that_cannot_be_killed_ends_as_lost() -> None:
    replay = Replay.calling(2, unkillable=[1])
    replay.play([(T0 + 2, Says(0, FAILED))])
    killed = T0 + 2 + GRACE_S + STACKS_S
    assert replay.ordered(KillRank) == [(killed, 1)]
    assert replay.failures == [(0, "failed"), (1, "blocked"), (1, "lost")]
    assert replay.now == killed + LOST_S
    assert replay.supervisor.settled
    assert replay.supervisor.busy == []


def test_a_lost_rank_that_ends_after_all_changes_nothing() -> None:
    replay = Replay.calling(1, unkillable=[0])
    replay.play([(T0 + 2, Floods(0, 1))])
    before = replay.supervisor.failures.copy()
    replay.play([(replay.now + 100, Ends(0, -signal.SIGKILL))])
    assert replay.supervisor.failures == before
    assert replay.supervisor.settled


def test_an_interrupt_kills_every_rank_that_lives_once() -> None:
    replay = Replay.calling(4)
    history = [(T0 + 1, Says(0, PASSED)), (T0 + 1, Ends(1, 1)), (T0 + 1, Floods(2, 1))]
    replay.play(history, until=T0 + 1)  # type: ignore[arg-type]  # a list of one union
    replay._note(replay.supervisor.interrupt(T0 + 1))
    replay.play([])
    assert replay.ordered(KillRank) == [(T0 + 1, 2), (T0 + 1, 0), (T0 + 1, 3)]
    assert replay.supervisor.settled
    assert replay.supervisor.interrupt(replay.now) == []


def test_an_interrupt_takes_the_terminal_from_the_debugger() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace")))], until=T0 + 5)
    replay._note(replay.supervisor.interrupt(replay.now))
    assert not replay.supervisor.paused
    replay.play([])
    assert replay.supervisor.settled


def test_when_what_started_the_ranks_is_gone_all_that_lived_are_lost_at_once() -> None:
    replay = Replay.calling(5)
    replay.play(
        [
            (T0 + 1, Says(0, PASSED)),
            (T0 + 1, Ends(1, 1)),
            (T0 + 1, Floods(2, 1)),
            (T0 + 1, Closes(3)),
            (T0 + 1, Says(4, DebugAsk("set_trace"))),
        ],
        until=T0 + 1,
    )
    replay.log.clear()
    replay.supervisor.abandon("the zygote was killed by signal 9", T0 + 1)
    assert replay.supervisor.settled
    assert not replay.supervisor.whole
    assert not replay.supervisor.paused
    assert replay.supervisor.idle == replay.supervisor.busy == []
    assert replay.failures[2:] == [(0, "lost"), (2, "lost"), (3, "lost"), (4, "lost")]
    assert "zygote" in replay.summary(4)
    assert replay.supervisor.wake_at() == math.inf
    assert replay.supervisor.tick(T0 + 1000) == []
    replay.play([(T0 + 1001, Ends(4, -signal.SIGKILL)), (T0 + 1001, Says(3, PASSED))])
    assert replay.log == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, ["code 0"]), (137, ["code 137"]), (-9, ["9", "SIGKILL"]), (-250, ["250"])],
)
def test_an_exit_is_told_by_its_code_or_its_signal(status: int, words: list[str]) -> None:
    text = exit_text(status)
    assert all(word in text for word in words)
    assert ("signal" in text) == (status < 0)


# Exchanges.


def test_when_all_ranks_meet_each_gets_all_payloads_in_rank_order() -> None:
    replay = Replay.calling(3)
    replay.play(
        [
            (T0 + 1, Says(2, Exchange("gather()", b"two"))),
            (T0 + 2, Says(0, Exchange("gather()", b""))),
            (T0 + 3, Says(1, Exchange("gather()", b"1"))),
        ],
        until=T0 + 4,
    )
    assert [at for at, _ in replay.log] == [T0 + 3] * 3
    for rank in range(3):
        (met,) = replay.sent(rank)
        assert isinstance(met, Met)
        assert met.error == ""
        assert met.values() == [b"", b"1", b"two"]
    assert sorted(replay.supervisor.busy) == [0, 1, 2]


def test_ranks_can_meet_again_and_again() -> None:
    replay = Replay.calling(2)
    history = []
    for turn in range(3):
        history += [(T0 + turn, Says(rank, Exchange("gather()", b"%d" % turn))) for rank in (0, 1)]
    replay.play(history, until=T0 + 3)
    assert [met.values() for met in replay.sent(1) if isinstance(met, Met)] == [
        [b"0", b"0"],
        [b"1", b"1"],
        [b"2", b"2"],
    ]


def test_a_world_of_one_meets_itself_at_once() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 1, Says(0, Exchange("gather()", b"x")))], until=T0 + 1)
    assert replay.log == [(T0 + 1, Send(0, Met(sizes=(1,), payload=b"x")))]


def error_to(replay: Replay, rank: int) -> str:
    """The error of the one `Met` that the rank got."""
    (met,) = replay.sent(rank)
    assert isinstance(met, Met)
    assert met.values() == []
    return met.error


def test_ranks_that_ask_for_different_things_all_get_the_error() -> None:
    replay = Replay.calling(2)
    replay.play(
        [(T0 + 1, Says(0, Exchange("barrier()"))), (T0 + 2, Says(1, Exchange("gather()", b"x")))],
        until=T0 + 2,
    )
    assert replay.ordered(Send) == [(T0 + 2, 0), (T0 + 2, 1)]
    for rank in (0, 1):
        error = error_to(replay, rank)
        assert "different things" in error
        assert "rank 0: barrier()" in error
        assert "rank 1: gather()" in error


def test_who_comes_after_a_mismatch_waits_for_the_next_meeting() -> None:
    replay = Replay.calling(3)
    replay.play(
        [
            (T0 + 1, Says(0, Exchange("barrier()"))),
            (T0 + 2, Says(1, Exchange("gather()"))),
            (T0 + 3, Says(2, Exchange("barrier()"))),
        ],
        until=T0 + 4,
    )
    assert replay.sent(2) == []
    again = [(T0 + 5, Says(rank, Exchange("barrier()"))) for rank in (0, 1)]
    replay.play(again, until=T0 + 5)
    assert replay.sent(2) == [Met(sizes=(0, 0, 0))]


ABSENCES: dict[str, tuple[Event, str]] = {
    "passed": (Says(1, PASSED), "call"),
    "skipped": (Says(1, done(outcome="skipped")), "call"),
    "failed": (Says(1, FAILED), "ValueError: 3"),
    "died": (Ends(1, -signal.SIGSEGV), "SIGSEGV"),
    "was killed": (Floods(1, 77), "77 bytes"),
}


@pytest.mark.parametrize(("event", "why"), ABSENCES.values(), ids=ABSENCES)
@pytest.mark.parametrize("first", ["the wait", "the absence"])
def test_who_waits_for_a_rank_that_will_not_come_is_told_at_once_and_why(
    event: Event, why: str, first: str
) -> None:
    wait = Says(0, Exchange("barrier()"))
    both: list[Event] = [wait, event] if first == "the wait" else [event, wait]
    replay = Replay.calling(2)
    replay.play([(T0 + 1 + i / 4, one) for i, one in enumerate(both)], until=T0 + 1.25)
    error = error_to(replay, 0)
    assert replay.ordered(Send) == [(T0 + 1.25, 0)]
    assert "cannot complete" in error
    assert "rank 1" in error
    assert "barrier()" in error
    assert why in error
    assert 0 in replay.supervisor.busy


def test_a_rank_that_the_kernel_ends_may_take_its_time_and_has_exited() -> None:
    replay = Replay.calling(2)
    late = T0 + 1 + EXITING_S - 1
    replay.play(
        [(T0 + 1, Closes(0)), (T0 + 1.125, Closes(0, exiting=True)), (late, Ends(0, 0))], until=late
    )
    assert replay.failures == [(0, "crashed")]
    assert replay.summary(0) == "exited with code 0 in call, without a verdict"


def test_a_rank_that_the_kernel_does_not_get_to_end_is_killed() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Closes(0, exiting=True)), (T0 + 2, Says(1, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 1 + EXITING_S, 0)]


def test_a_socket_that_closed_does_not_yet_end_a_meeting_but_the_exit_does() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, Exchange("barrier()"))), (T0 + 1, Closes(1))], until=T0 + 1.125)
    assert replay.log == []
    replay.play([(T0 + 1.1875, Ends(1, 1))], until=T0 + 1.1875)
    assert "cannot complete" in error_to(replay, 0)


def test_a_rank_that_dies_at_an_exchange_frees_the_others() -> None:
    replay = Replay.calling(3)
    met = [(T0 + 1, Says(rank, Exchange("barrier()"))) for rank in (0, 1)]
    replay.play([*met, (T0 + 2, Ends(1, -signal.SIGKILL))], until=T0 + 2)
    assert replay.ordered(Send) == [(T0 + 2, 0)]
    assert "SIGKILL" in error_to(replay, 0)


def test_the_survivors_of_a_failed_phase_can_not_meet_the_dead() -> None:
    # What wind-down does: a teardown on the ranks that are left.
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Ends(1, 1)), (T0 + 1.5, Says(0, PASSED))])
    replay.begin([0], "teardown")
    replay.log.clear()
    replay.play([(replay.now, Says(0, Exchange("barrier()")))], until=replay.now)
    assert "cannot complete" in error_to(replay, 0)


# An error that the peers of a rank have not heard of.

FAILING = At("failing", "ValueError: 3", 99.5, "the traceback")
AGREED = At("agreed")


def test_a_rank_whose_peers_hang_when_it_waits_with_an_error_names_that() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILING))])
    assert replay.ordered(Dump) == [(T0 + 1 + FAILING_S, rank) for rank in (0, 1)]
    assert replay.failures == [(0, "failed"), (1, "blocked")]
    said = "ValueError: 3 (killed: it waited for its peers to hear of that)"
    assert replay.summary(0) == said
    first = replay.supervisor.failures[0]
    assert (first.at_s, first.detail) == (99.5, "the traceback")
    assert replay.summary(1) == "still in call"


def test_peers_that_come_late_to_hear_of_an_error_make_no_failure_of_it() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 1, Says(0, FAILING)),
            (T0 + FAILING_S, Says(0, AGREED)),
            (T0 + 2 * FAILING_S, Says(0, PASSED)),  # it was expected
            (T0 + 2 * FAILING_S, Says(1, PASSED)),
        ]
    )
    assert (replay.failures, replay.ordered(Dump)) == ([], [])


def test_the_time_limit_of_a_test_that_waits_with_an_error_is_not_the_cause() -> None:
    replay = Replay.calling(2, limit_s=5.0)
    wait = [(T0 + 1, Says(0, FAILING)), (T0 + 1, Says(0, Exchange("record(): it ends")))]
    replay.play(wait)
    assert replay.failures == [(0, "failed"), (1, "timeout")]
    assert replay.ordered(KillRank)[0][0] == T0 + 5 + STACKS_S


def test_a_rank_that_dies_while_it_waits_with_an_error_has_told_of_it() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILING)), (T0 + 2, Ends(0, -11)), (T0 + 2, Says(1, PASSED))])
    assert replay.failures == [(0, "crashed")]
    assert replay.summary(0).endswith("it had raised ValueError: 3")


def test_the_wait_with_an_error_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FAILING)), *debugged(1.5, 900, 1)])
    assert replay.ordered(Dump)[0][0] == T0 + 1 + (900 - 1.5) + FAILING_S


# A phase that an interrupt of the session cuts off.

HEEDS = At("interrupted")
RAISED = done(outcome="interrupt")


def test_ranks_at_work_are_interrupted_until_they_say_that_they_heard() -> None:
    replay = Replay.calling(2)
    heard = [(T0 + 5.3, Says(0, HEEDS)), (T0 + 5.4, Says(0, RAISED)), (T0 + 5.6, Says(1, RAISED))]
    replay.play([(T0 + 5, Interrupted()), *heard])
    sent = replay.ordered(Interrupt)
    assert sent[:2] == [(T0 + 5, 0), (T0 + 5, 1)]
    assert [at for at, rank in sent if rank == 1] == [T0 + 5 + n * AGAIN_S for n in range(3)]
    assert (replay.failures, replay.ordered(KillRank)) == ([], [])
    assert replay.supervisor.whole


def test_a_rank_that_hangs_when_it_is_interrupted_is_killed_and_its_peers_get_time() -> None:
    replay = Replay.calling(2)
    ends = T0 + 5 + HEED_S + 3
    replay.play([(T0 + 5, Interrupted()), (T0 + 5.1, Says(0, HEEDS)), (ends, Says(0, RAISED))])
    assert replay.ordered(Dump) == [(T0 + 5 + HEED_S, 1)]
    assert replay.ordered(KillRank) == [(T0 + 5 + HEED_S + STACKS_S, 1)]
    assert replay.failures == [(1, "blocked")]
    assert replay.summary(1) == "still in call 1.7 s after it was interrupted"
    assert replay.supervisor.idle == [0]


def test_a_rank_that_heard_an_interrupt_is_not_waited_for_without_end() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 5, Interrupted()), *((T0 + 5, Says(rank, HEEDS)) for rank in (0, 1))])
    assert replay.ordered(KillRank) == [(T0 + 5 + END_S + STACKS_S, rank) for rank in (0, 1)]


def test_a_rank_at_work_has_longer_to_hear_an_interrupt() -> None:
    replay = Replay.calling(1)
    seen = T0 + 5 + HEED_S - 0.5
    replay.play([(T0 + 5, Interrupted()), (seen, SeenAtWork(0))])
    assert replay.ordered(KillRank) == [(seen + HEED_S + STACKS_S, 0)]
    replay = Replay.calling(1)
    always = [(T0 + 5 + n, SeenAtWork(0)) for n in range(30)]
    replay.play([(T0 + 5, Interrupted()), *always], until=T0 + 60)
    assert replay.ordered(KillRank) == [(T0 + 5 + END_S + STACKS_S, 0)]


@pytest.mark.parametrize("phase", ["teardown", "finish"])
def test_ranks_that_tear_down_are_not_interrupted_but_have_a_limit(phase: Phase) -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], phase, order=Leave() if phase == "finish" else None)
    replay.play([(T0 + 5, Interrupted()), (T0 + 8, Says(0, done(phase)))], until=T0 + 60)
    assert replay.ordered(Interrupt) == []
    assert (T0 + 5 + END_S + STACKS_S, 1) in replay.ordered(KillRank)


def test_a_rank_that_is_interrupted_at_an_exchange_gives_its_verdict() -> None:
    replay = Replay.calling(2)
    wait = [(T0 + 1, Says(rank, Exchange("barrier()"))) for rank in (0,)]
    heard = [(T0 + 5, Says(0, HEEDS)), (T0 + 5, Says(0, RAISED)), (T0 + 5, Says(1, RAISED))]
    replay.play([*wait, (T0 + 5, Interrupted()), *heard])
    assert replay.failures == []
    assert replay.supervisor.idle == [0, 1]
    assert replay.ordered(Send) == []


def test_what_failed_before_an_interrupt_stays_a_failure_and_the_peers_get_their_time() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 4.5, Says(0, FAILED)),
            (T0 + 5, Interrupted()),
            (T0 + 5.1, Says(1, HEEDS)),
            (T0 + 5 + GRACE_S + 2, Says(1, RAISED)),
        ]
    )
    assert replay.failures == [(0, "failed")]
    assert replay.ordered(KillRank) == []


def test_a_rank_in_a_debugger_is_killed_when_the_session_is_interrupted() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace")))], until=T0 + 2)
    replay.play([(T0 + 5, Interrupted()), (T0 + 5.5, Says(1, RAISED))])
    assert replay.ordered(KillRank) == [(T0 + 5, 0)]
    assert replay.summary(0) == "stopped in call, in a debugger"


def test_the_phase_after_one_that_was_cut_off_runs_as_usual() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 5, Interrupted()), (T0 + 5.5, Says(0, RAISED))])
    replay.begin([0], "teardown", limit_s=30.0)
    replay.play([(replay.now + 20, Says(0, done("teardown")))])
    assert replay.failures == []
    assert replay.ordered(KillRank) == []


# Messages out of turn.

OUT_OF_TURN: dict[str, tuple[list[Up], Up]] = {
    "an answer while idle": ([PASSED], PASSED),
    "an exchange while idle": ([PASSED], Exchange("barrier()")),
    "a debugger while idle": ([PASSED], DebugAsk("set_trace")),
    "an answer at an exchange": ([Exchange("barrier()")], PASSED),
    "a second exchange": ([Exchange("barrier()")], Exchange("barrier()")),
    "an interrupted answer while idle": ([PASSED], RAISED),
    "a place at an exchange": ([Exchange("barrier()")], At("ready")),
    "a debugger at an exchange": ([Exchange("barrier()")], DebugAsk("set_trace")),
    "a terminal given back that it never had": ([], DebugDone()),
    "an answer in the debugger": ([DebugAsk("set_trace")], PASSED),
    "the terminal back, at an exchange": (
        [DebugAsk("set_trace"), Exchange("barrier()")],
        DebugDone(),
    ),
    "a second debugger": ([DebugAsk("set_trace")], DebugAsk("set_trace")),
    "a message that is not the supervisor's": ([], SubReport({})),
    "preparing what the call needs": ([], At("preparing", "collecting the test")),
}


@pytest.mark.parametrize(("before", "message"), OUT_OF_TURN.values(), ids=OUT_OF_TURN)
def test_a_rank_that_speaks_out_of_turn_is_killed_and_named_with_what_it_said(
    before: list[Up], message: Up
) -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Says(1, one)) for one in before]
    replay.play([*history, (T0 + 2, Says(1, message)), (T0 + 2.5, Says(0, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 2, 1)]
    assert replay.failures == [(1, "closed")]
    assert type(message).__name__ in replay.summary(1)
    assert not replay.supervisor.paused


@pytest.mark.parametrize("phase", ["setup", "teardown", "finish"])
@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_an_answer_to_another_order_is_no_answer(phase: Phase, outcome: RankOutcome) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, done(phase, outcome))), (T0 + 1, Says(0, PASSED))])
    assert replay.failures == [(1, "closed")]
    assert 1 not in replay.supervisor.done
    assert replay.summary(1).startswith(f"ended {phase} while in call: ")


@pytest.mark.parametrize("act", get_args(FaultAct))
@pytest.mark.parametrize("rank", [-1, 2, 10**30])
def test_a_fault_for_a_rank_that_the_world_does_not_have_is_refused(
    act: FaultAct, rank: int
) -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, FaultAsk(act, rank))), (T0 + 1, Says(0, PASSED))])
    assert replay.failures == [(1, "closed")]
    assert replay.summary(1) == f"asked to {act} rank {rank} of a world of 2"


# Leaving.

EXITED = Done("finish", "passed", T0 + 1)


def test_ranks_that_leave_with_code_0_are_gone_without_a_failure() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    assert replay.sent(1) == [Leave()]
    replay.play(
        [
            *((T0 + 1, event) for event in (Says(0, EXITED), Closes(0), Ends(0, 0))),
            *((T0 + 5, event) for event in (Says(1, EXITED), Closes(1))),
            (T0 + 6, Ends(1, 0)),
        ]
    )
    assert replay.failures == []
    assert replay.supervisor.settled
    assert replay.supervisor.idle == []
    assert replay.ordered(KillRank) == []


@pytest.mark.parametrize(("status", "how"), [(1, "code 1"), (-signal.SIGSEGV, "SIGSEGV")])
def test_a_rank_that_leaves_otherwise_failed_after_its_verdict(status: int, how: str) -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, EXITED)), (T0 + 1, Ends(0, 0)), (T0 + 1, Ends(1, status))])
    assert replay.failures == [(1, "crashed")]
    assert how in replay.summary(1)
    assert "after its verdict" in replay.summary(1)


def test_code_0_of_a_rank_that_did_not_say_that_its_exit_ran_is_a_failure() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, EXITED)), (T0 + 1, Ends(0, 0)), (T0 + 1, Ends(1, 0))])
    assert replay.failures == [(1, "crashed")]
    assert replay.summary(1) == "exited with code 0 before its exit had finished"


def test_the_verdict_of_an_earlier_phase_does_not_say_that_the_exit_ran() -> None:
    replay = Replay.calling(1)
    replay.play([(T0 + 1, Says(0, PASSED))])
    replay.begin([0], "finish", order=Leave())
    replay.play([(T0 + 2, Ends(0, 0))])
    assert replay.failures == [(0, "crashed")]


def test_a_rank_that_does_not_leave_in_time_is_killed() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", limit_s=20.0, order=Leave())
    replay.play([(T0 + 1, Says(0, EXITED)), (T0 + 1, Ends(0, 0)), (T0 + 1, Closes(1))])
    assert replay.log[2:] == [(T0 + 20, Dump(1)), (T0 + 20 + STACKS_S, KillRank(1))]
    assert replay.failures == [(1, "timeout")]


def test_a_rank_that_talks_while_it_leaves_is_killed() -> None:
    replay = Replay.ready(1)
    replay.begin([0], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 1, 0)]


def test_a_rank_that_leaves_says_once_how_its_exit_went() -> None:
    replay = Replay.ready(2)
    replay.begin([0, 1], "finish", order=Leave())
    last_word = Done("finish", "passed", T0 + 1, threads=("sleeper",))
    said = [(T0 + 1, Says(0, last_word)), (T0 + 1, Says(1, EXITED))]
    replay.play([*said, (T0 + 2, Ends(0, 0)), (T0 + 2, Ends(1, 0))])
    assert replay.supervisor.done == {0: last_word, 1: EXITED}
    assert replay.supervisor.settled
    assert replay.failures == []


def test_a_rank_that_says_how_its_exit_went_still_has_to_exit_with_0() -> None:
    replay = Replay.ready(1)
    replay.begin([0], "finish", order=Leave())
    replay.play([(T0 + 1, Says(0, Done("finish", "passed", T0 + 1))), (T0 + 2, Ends(0, 3))])
    assert replay.failures == [(0, "crashed")]
    assert "exited with code 3 after its verdict" in replay.summary(0)


def test_a_rank_that_says_it_twice_is_killed() -> None:
    replay = Replay.ready(1)
    replay.begin([0], "finish", order=Leave())
    last_word = Done("finish", "passed", T0 + 1)
    replay.play([(T0 + 1, Says(0, last_word)), (T0 + 2, Says(0, last_word))])
    assert replay.ordered(KillRank) == [(T0 + 2, 0)]


# The debugger.


def test_the_first_that_asks_gets_the_terminal_and_its_group() -> None:
    replay = Replay.calling(2, terminal=Terminal(group=4321))
    replay.play([(T0 + 1, Says(1, DebugAsk("set_trace")))], until=T0 + 1)
    assert replay.log == [(T0 + 1, Send(1, DebugAnswer(granted=True, group=4321)))]
    assert replay.supervisor.paused
    assert replay.supervisor.wake_at() == math.inf


def test_a_second_asker_goes_on_without_and_without_an_error() -> None:
    replay = Replay.calling(2)
    asks = [(T0 + 1 + rank, Says(rank, DebugAsk("post_mortem"))) for rank in (0, 1)]
    replay.play(asks, until=T0 + 2)
    assert replay.sent(1) == [DebugAnswer(granted=False)]
    assert 1 in replay.supervisor.busy
    # Nor later, when the terminal is free: the user talks to one rank.
    replay.play(
        [(T0 + 3, Says(0, DebugDone())), (T0 + 4, Says(1, DebugAsk("again")))], until=T0 + 4
    )
    assert replay.sent(1) == [DebugAnswer(granted=False)] * 2


def test_the_rank_that_had_the_terminal_gets_it_again() -> None:
    replay = Replay.calling(2)
    replay.play(
        [
            (T0 + 1, Says(1, DebugAsk("set_trace"))),
            (T0 + 2, Says(1, DebugDone())),
            (T0 + 3, Says(1, DebugAsk("set_trace"))),
        ],
        until=T0 + 3,
    )
    assert replay.sent(1) == [DebugAnswer(granted=True)] * 2
    assert replay.supervisor.paused


def test_a_pinned_rank_gets_the_terminal_although_another_asked_first() -> None:
    replay = Replay.calling(2, terminal=Terminal(rank=1))
    asks = [(T0 + 1 + rank, Says(rank, DebugAsk("set_trace"))) for rank in (0, 1)]
    replay.play(asks, until=T0 + 2)
    assert replay.sent(0) == [DebugAnswer(granted=False)]
    assert replay.sent(1) == [DebugAnswer(granted=True)]


def test_without_a_terminal_every_asker_is_told_why() -> None:
    replay = Replay.calling(2, terminal=Terminal(missing="pytest -n has no terminal"))
    asks = [(T0 + 1, Says(rank, DebugAsk("set_trace"))) for rank in (0, 1)]
    replay.play(asks, until=T0 + 1)
    for rank in (0, 1):
        assert replay.sent(rank) == [DebugAnswer(granted=False, error="pytest -n has no terminal")]
    assert not replay.supervisor.paused


def debugged(start: float, end: float, rank: int = 0) -> list[tuple[float, Event]]:
    """A rank has the terminal for a while."""
    return [(T0 + start, Says(rank, DebugAsk("set_trace"))), (T0 + end, Says(rank, DebugDone()))]


def test_the_time_limit_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([*debugged(4, 1004)])
    assert replay.ordered(Dump) == [(T0 + 1010, 0), (T0 + 1010, 1)]
    assert replay.ordered(KillRank)[0] == (T0 + 1010 + STACKS_S, 0)


def test_the_grace_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(3, limit_s=math.inf)
    replay.play([(T0 + 1, Says(2, FAILED)), *debugged(1.25, 1001.25)])
    # A quarter of the grace was over before, so three quarters are left after.
    assert replay.ordered(Dump) == [(T0 + 1001.25 + 0.75, 0), (T0 + 1001.25 + 0.75, 1)]


def test_a_failure_during_the_pause_leaves_the_peers_the_grace_and_no_more() -> None:
    replay = Replay.calling(3, limit_s=math.inf)
    replay.play([*debugged(0, 3600), (T0 + 3000, Says(2, FAILED))])
    assert replay.ordered(Dump) == [(T0 + 3600 + GRACE_S, 0), (T0 + 3600 + GRACE_S, 1)]


def test_the_time_for_stacks_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([*debugged(10 + STACKS_S / 2, 100)])
    (at, _), *_ = replay.ordered(KillRank)
    assert T0 + 100 < at <= T0 + 100 + STACKS_S


def test_who_steps_over_an_exchange_in_the_debugger_meets_its_peers_and_keeps_the_terminal() -> (
    None
):
    replay = Replay.calling(2, limit_s=10.0)
    barrier = Exchange("barrier()")
    history = [(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 100, Says(0, barrier))]
    replay.play([*history, (T0 + 200, Says(1, barrier))], until=T0 + 300)
    assert replay.sent(0)[1:] == replay.sent(1) == [Met(sizes=(0, 0))]
    assert replay.supervisor.paused
    replay.play([(T0 + 400, Says(0, DebugDone()))])
    # One second of ten was used before the debugger: nine are left.
    assert replay.ordered(Dump) == [(T0 + 409, 0), (T0 + 409, 1)]


def test_who_waits_in_the_debugger_for_a_rank_that_will_not_come_keeps_the_terminal() -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 2, Says(0, Exchange("barrier()")))]
    replay.play([*history, (T0 + 3, Says(1, PASSED))], until=T0 + 3)
    granted, met = replay.sent(0)
    assert granted == DebugAnswer(granted=True)
    assert isinstance(met, Met)
    assert "cannot complete" in met.error
    assert replay.supervisor.paused


def test_a_rank_that_dies_in_the_debugger_starts_the_clocks_again() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 500, Ends(0, 1))])
    assert replay.failures == [(0, "crashed"), (1, "blocked")]
    assert replay.ordered(Dump) == [(T0 + 500 + GRACE_S, 1)]


def test_a_rank_that_floods_in_the_debugger_starts_the_clocks_again() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 500, Floods(0, 1))])
    assert replay.failures == [(0, "flooded"), (1, "blocked")]


def test_a_rank_that_closes_its_socket_in_the_debugger_and_lives_is_killed() -> None:
    # It can no longer say that it is done, so nothing would ever start the clocks again.
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, DebugAsk("set_trace"))), (T0 + 9, Closes(0))])
    assert replay.ordered(KillRank)[0] == (T0 + 9 + CLOSED_S, 0)
    assert replay.failures[0] == (0, "closed")


# Deaths and stops that the test asked for.

KILLED = -signal.SIGKILL


@pytest.mark.parametrize("status", [KILLED, 0, 1])
def test_a_death_that_was_announced_is_no_failure_and_its_peers_go_on(status: int) -> None:
    replay = Replay.calling(3)
    replay.play(
        [
            (T0 + 1, Says(1, Announce("NoSpace at write_data"))),
            (T0 + 1, Ends(1, status)),
            (T0 + 30, Says(0, PASSED)),
            (T0 + 31, Says(2, PASSED)),
        ]
    )
    assert replay.failures == []
    assert set(replay.supervisor.done) == {0, 2}
    assert replay.log == []
    assert replay.lost[1] == f"{exit_text(status)} as asked: NoSpace at write_data"
    assert replay.supervisor.idle == [0, 2]
    assert not replay.supervisor.whole


def test_a_rank_that_announces_its_death_and_lives_is_a_failure_and_is_killed() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, Announce("at save"))), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "spared")]
    assert "at save" in replay.summary(1)
    assert replay.ordered(KillRank) == [(T0 + 1 + OWED_S, 1)]
    assert replay.lost == {}


def test_a_rank_that_announces_its_death_and_then_answers_must_still_die() -> None:
    # A worker thread announces; before it acts, the main thread comes to the end of the phase.
    replay = Replay.calling(2)
    said = [(T0 + 1, Says(1, Announce("at save"))), *[(T0 + 1, Says(r, PASSED)) for r in (0, 1)]]
    replay.play(said, until=T0 + 2)
    assert not replay.supervisor.settled
    replay.play([(T0 + 2, Ends(1, KILLED))])
    assert replay.failures == []
    assert set(replay.lost) == {1}
    replay = Replay.calling(2)
    replay.play(said)
    assert replay.failures == [(1, "spared")]


def test_a_failure_before_the_announced_death_stays_one() -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Says(1, FAILED)), (T0 + 1, Says(1, Announce("late")))]
    replay.play([*history, (T0 + 1, Ends(1, KILLED)), (T0 + 1.5, Says(0, PASSED))])
    assert replay.failures == [(1, "failed")]


def test_the_death_of_one_rank_that_was_asked_for_excuses_no_other() -> None:
    replay = Replay.calling(3)
    history = [(T0 + 1, Says(1, Announce("at save"))), (T0 + 1, Ends(1, KILLED))]
    replay.play([*history, (T0 + 2, Ends(2, KILLED))])
    assert replay.failures == [(2, "crashed"), (0, "blocked")]
    assert set(replay.lost) == {1}


def test_a_rank_is_killed_at_another_s_word_and_the_asker_hears_when_it_is_gone() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Says(0, FaultAsk("kill", 2)))], until=T0 + 2)
    assert replay.log == [
        (T0 + 1, KillRank(2)),
        (T0 + 1 + DYING_S, Send(0, FaultAnswer(survivors=(0, 1)))),
    ]
    replay.play([(T0 + 3, Says(rank, PASSED)) for rank in (0, 1)])
    assert replay.failures == []
    assert "SIGKILL" in replay.lost[2]
    assert "world.kill(2) in rank 0" in replay.lost[2]


def test_a_rank_that_has_itself_killed_hears_nothing() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, FaultAsk("kill", 1))), (T0 + 2, Says(0, PASSED))])
    assert replay.log == [(T0 + 1, KillRank(1))]
    assert replay.failures == []
    assert set(replay.lost) == {1}


def test_to_kill_a_rank_twice_is_to_kill_it_once_and_both_askers_hear() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Says(rank, FaultAsk("kill", 2))) for rank in (0, 1)], until=T0 + 2)
    replay.play([(T0 + 3, Says(0, FaultAsk("kill", 2)))], until=T0 + 3)
    assert replay.ordered(KillRank) == [(T0 + 1, 2)]
    assert [at for at, _ in replay.ordered(Send)] == [T0 + 1 + DYING_S] * 2 + [T0 + 3]


def test_who_is_killed_as_asked_and_does_not_go_away_is_lost_as_a_failure() -> None:
    replay = Replay.calling(2, unkillable=[1])
    replay.play([(T0 + 1, Strikes("kill", 1)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "lost")]
    assert replay.lost == {}
    assert replay.supervisor.settled
    replay.play([(replay.now + 100, Ends(1, KILLED))])
    assert replay.lost == {}


def test_an_asker_that_is_killed_itself_is_not_answered() -> None:
    replay = Replay.calling(3, unkillable=[0, 1])
    asks = [(T0 + 1, Says(0, FaultAsk("kill", 1))), (T0 + 2, Floods(0, 1))]
    replay.play([*asks, (T0 + 2.5, Ends(1, KILLED))], until=T0 + 2.75)
    assert replay.sent(0) == []


def test_a_paused_rank_holds_nobody_up_and_is_killed_at_the_end_of_the_phase() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Says(0, FaultAsk("pause", 2)))], until=T0 + 2)
    assert replay.sent(0) == [FaultAnswer(survivors=(0, 1))]
    replay.play([(T0 + 30, Says(rank, PASSED)) for rank in (0, 1)])
    assert replay.ordered(KillRank) == []
    replay.dismiss()
    assert replay.ordered(KillRank) == [(T0 + 30, 2)]
    assert replay.failures == []
    assert "stopped as asked: world.pause(2) in rank 0" in replay.lost[2]


def test_a_paused_rank_that_is_resumed_owes_its_answer_again() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(0, FaultAsk("pause", 1)))], until=T0 + 2)
    replay.play([(T0 + 2, Says(0, FaultAsk("resume", 1)))], until=T0 + 3)
    assert replay.sent(0) == [FaultAnswer(survivors=(0,)), FaultAnswer(survivors=(0, 1))]
    replay.play([(T0 + 3, Says(0, PASSED))], until=T0 + 20)
    assert not replay.supervisor.settled
    replay.play([(T0 + 20, Says(1, PASSED))])
    assert replay.failures == []
    assert replay.lost == {}
    assert replay.supervisor.whole


def test_a_rank_that_is_about_to_stop_is_resumed_when_it_has_stopped() -> None:
    replay = Replay.calling(2)
    asks = [(T0 + 1, Says(1, Announce("at save"))), (T0 + 2, Says(0, FaultAsk("resume", 1)))]
    replay.play([*asks, (T0 + 3, Halts(1, True))], until=T0 + 4)
    assert replay.ordered(Continue) == [(T0 + 3, 1)]
    assert replay.ordered(Send) == [(T0 + 3 + DYING_S, 0)]
    assert replay.supervisor.deaths.wishes == {}


def test_a_rank_that_stopped_and_went_on_before_anybody_looked_owes_nothing_more() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Says(1, Announce("at save"))), (T0 + 2, Halts(1, False))], until=T0 + 3)
    assert replay.supervisor.deaths.wishes == {}
    replay.play([(T0 + 20, Says(rank, PASSED)) for rank in (0, 1)])
    assert replay.failures == []


def test_a_rank_that_should_be_paused_and_is_not_is_a_failure() -> None:
    replay = Replay.calling(2, unkillable=[1])
    replay.play([(T0 + 1, Strikes("pause", 1)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures[0] == (1, "spared")


def test_a_rank_that_should_be_paused_and_dies_first_has_crashed() -> None:
    replay = Replay.calling(2)
    history = [(T0 + 1, Strikes("pause", 1)), (T0 + 1, Ends(1, -signal.SIGSEGV))]
    replay.play([*history, (T0 + 1.5, Says(0, PASSED))])
    assert replay.failures == [(1, "crashed")]
    assert replay.lost == {}


def test_a_rank_that_stops_unasked_is_waited_for_until_the_limit() -> None:
    replay = Replay.calling(2, limit_s=10.0)
    replay.play([(T0 + 1, Halts(1, True)), (T0 + 1, Says(0, PASSED))])
    assert replay.failures == [(1, "timeout")]


def test_at_the_limit_a_paused_rank_is_killed_as_asked_and_those_that_run_are_named() -> None:
    replay = Replay.calling(3, limit_s=10.0)
    replay.play([(T0 + 1, Strikes("pause", 2)), (T0 + 2, Says(0, PASSED))])
    assert replay.failures == [(1, "timeout")]
    assert set(replay.lost) == {2}
    assert replay.ordered(Dump) == [(T0 + 10, 1)]


def test_a_peer_s_failure_does_not_make_a_paused_rank_one() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Strikes("pause", 2)), (T0 + 2, Says(0, FAILED))])
    assert replay.failures == [(0, "failed"), (1, "blocked")]
    assert set(replay.lost) == {2}


def test_what_cannot_be_done_to_a_rank_that_is_gone_is_told() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Strikes("kill", 1))], until=T0 + 2)
    for act in ("pause", "resume"):
        replay.play([(T0 + 3, Says(0, FaultAsk(act, 1)))], until=T0 + 3)
    errors = [m.error for m in replay.sent(0) if isinstance(m, FaultAnswer)]
    assert errors == [f"rank 1 is gone: there is nothing to {act}" for act in ("pause", "resume")]


def test_the_survivors_of_an_asked_for_death_meet_without_the_dead() -> None:
    replay = Replay.calling(3)
    meet = [(T0 + 1, Says(rank, Exchange("gather()", b"%d" % rank))) for rank in (0, 2)]
    replay.play([*meet, (T0 + 2, Strikes("kill", 1))], until=T0 + 3)
    (met,) = replay.sent(0)
    assert isinstance(met, Met)
    assert met.values() == [b"0", None, b"2"]
    replay.play([(T0 + 4, Says(rank, Exchange("barrier()"))) for rank in (0, 2)], until=T0 + 4)
    assert replay.sent(0)[1:] == [Met(sizes=(0, -1, 0))]


def test_ranks_meet_without_one_that_is_paused_and_with_it_when_it_was_there_first() -> None:
    replay = Replay.calling(3)
    replay.play([(T0 + 1, Strikes("pause", 1))], until=T0 + 1.5)
    meet = [(T0 + 2, Says(rank, Exchange("gather()", b"%d" % rank))) for rank in (0, 2)]
    replay.play(meet, until=T0 + 3)
    (met,) = replay.sent(0)
    assert isinstance(met, Met)
    assert met.values() == [b"0", None, b"2"]
    replay = Replay.calling(2)
    waits = [(T0 + 1, Says(1, Exchange("gather()", b"1"))), (T0 + 2, Strikes("pause", 1))]
    replay.play([*waits, (T0 + 3, Says(0, Exchange("gather()", b"0")))], until=T0 + 3)
    assert replay.sent(1) == [Met(sizes=(1, 1), payload=b"01")]


def test_who_dies_unasked_is_still_waited_for_in_vain() -> None:
    replay = Replay.calling(3)
    meet = [(T0 + 1, Says(0, Exchange("barrier()"))), (T0 + 2, Strikes("kill", 1))]
    replay.play([*meet, (T0 + 3, Ends(2, KILLED))], until=T0 + 3)
    assert "rank 2 (was killed by signal 9" in error_to(replay, 0)
    assert "rank 1 (" not in error_to(replay, 0)


def test_a_lost_rank_stays_lost_in_the_phases_that_follow() -> None:
    replay = Replay.calling(2)
    replay.play([(T0 + 1, Strikes("kill", 1)), (T0 + 2, Says(0, PASSED))])
    replay.begin(replay.supervisor.idle, "teardown")
    replay.play([(T0 + 3, Says(0, Exchange("barrier()"))), (T0 + 4, Says(0, done("teardown")))])
    assert replay.failures == []
    assert set(replay.supervisor.done) == {0}
    assert set(replay.lost) == {1}


def test_the_time_to_die_stands_still_while_a_rank_has_the_terminal() -> None:
    replay = Replay.calling(2, limit_s=math.inf)
    history = [(T0 + 1, Says(1, Announce("at save"))), *debugged(2, 1002)]
    replay.play([*history, (T0 + 1003, Says(0, PASSED))])
    assert replay.ordered(KillRank) == [(T0 + 1001 + OWED_S, 1)]


# Any history.

Intent = Literal[
    "pass", "fail", "meet", "diverge", "debug", "babble", "die", "leave", "close", "flood",
    "announce", "kill", "pause", "resume", "kill next", "pause next", "resume next",
    "prepare", "ready", "report",
]  # fmt: skip
"""What a rank is about to do; what that means depends on where it is."""


class Witness:
    """Runs fake ranks against a supervisor through any history, keeping books of its own.

    It knows only what was told and what was ordered; the supervisor's states it never looks at.
    """

    def __init__(self, size: int, unkillable: frozenset[int], limit_s: float) -> None:
        self.supervisor = Supervisor(size, grace_s=GRACE_S, terminal=Terminal())
        self.now = T0
        self.unkillable = unkillable
        self.doing = dict.fromkeys(range(size), "running")
        """idle, running, asking, meeting, debugging, debugging and meeting, killed or gone."""
        self.asked: set[int] = set()
        """Ranks whose end or stop was asked for, and that did not go on since."""
        self.stopped: set[int] = set()
        self.halting: list[Halts] = []
        """What signals will do, not yet told."""
        self.ordered: set[int] = set(range(size))
        """Ranks that owe an answer to this phase."""
        self.paused_s = 0.0
        self.allowed_s = 0.0
        """Time beyond the limit for what ranks said that they prepare or report, at most."""
        self.limit_s = limit_s
        self.deadline = T0 + limit_s
        self.supervisor.boot(self.deadline)

    def watch(self, actions: Sequence[Action]) -> None:
        for action in actions:
            state = self.doing[action.rank]
            assert state not in ("killed", "gone"), f"{action} to a rank that is {state}"
            match action:
                case KillRank(rank):
                    self.doing[rank] = "killed"
                case StopRank(rank) | Continue(rank):
                    self.halting.append(Halts(rank, isinstance(action, StopRank)))
                case Send(rank, FaultAnswer()):
                    assert state == "asking"
                    self.doing[rank] = "running"
                case Send(rank, Met()):
                    assert "meeting" in state
                    self.doing[rank] = "debugging" if "debugging" in state else "running"
                case Send(rank, DebugAnswer(granted)):
                    assert not (granted and self.holder is not None), "two have the terminal"
                    self.doing[rank] = "debugging" if granted else "running"
                case Send(rank, _):
                    assert state == "idle"
                    self.doing[rank] = "running"

    @property
    def holder(self) -> int | None:
        """The rank that has the terminal."""
        return next((rank for rank, state in self.doing.items() if "debugging" in state), None)

    def act(self, rank: int, intent: Intent) -> None:
        """Have a rank do something that fits where it is, if anything does."""
        if rank in self.stopped and intent not in ("die", "kill", "resume"):
            return
        target = (rank + 1) % len(self.doing)
        meeting = Exchange("barrier()" if intent == "meet" else "gather()", b"x")
        match self.doing[rank], intent:
            case "killed", "pass" | "fail":  # said before the kill, and still on its way
                self.tell(Says(rank, PASSED if intent == "pass" else FAILED))
            case "killed", "meet" | "diverge":
                self.tell(Says(rank, meeting))
            case "running", "pass" | "fail":
                self.doing[rank] = "idle"
                self.tell(Says(rank, PASSED if intent == "pass" else FAILED))
            case ("running" | "debugging") as state, "meet" | "diverge":
                self.doing[rank] = "meeting" if state == "running" else "debugging and meeting"
                self.tell(Says(rank, meeting))
            case "running", "debug":
                self.tell(Says(rank, DebugAsk("set_trace")))
            case "debugging", "pass" | "fail" | "debug":
                self.doing[rank] = "running"
                self.tell(Says(rank, DebugDone()))
            case (("running" | "debugging"), "prepare" | "ready"):
                self.allowed_s += PREPARE_S
                place: Place = "preparing" if intent == "prepare" else "ready"
                self.tell(Says(rank, At(place, "importing torch")))
            case (("running" | "debugging"), "report"):
                self.allowed_s += REPORT_S
                self.tell(Says(rank, At("reporting", "ValueError: 3", self.now)))
            case _, "babble":
                self.tell(Says(rank, SubReport({})))
            case state, "die" | "leave" if state != "gone":
                self.end(rank, 0 if intent == "leave" else -signal.SIGSEGV)
            case state, "announce" if state not in ("killed", "gone"):
                self.asked.add(rank)
                self.tell(Says(rank, Announce("at save")))
            case state, "kill" | "pause" as wish if state not in ("killed", "gone"):
                self.asked.add(rank)
                self.tell(Strikes(wish, rank))
            case _, "resume":
                self.tell(Strikes("resume", rank))
            case "running", "kill next" | "pause next" | "resume next":
                act = intent.removesuffix(" next")
                if act != "resume" and self.doing[target] not in ("killed", "gone"):
                    self.asked.add(target)
                self.doing[rank] = "asking"
                self.tell(Says(rank, FaultAsk(act, target)))  # type: ignore[arg-type]  # the act
            case _, "close":
                self.tell(Closes(rank))
            case _, "flood":
                self.tell(Floods(rank, 1 << 30))

    def halt(self) -> None:
        """Let the signals that were sent have their effect."""
        halting, self.halting = self.halting, []
        for one in halting:
            if self.doing[one.rank] in ("killed", "gone") or one.rank in self.unkillable:
                continue
            if one.stopped:
                self.stopped.add(one.rank)
            elif one.rank in self.stopped:
                self.stopped.discard(one.rank)
                self.asked.discard(one.rank)
            self.tell(one)

    def end(self, rank: int, status: int) -> None:
        self.doing[rank] = "gone"
        self.stopped.discard(rank)
        self.tell(Ends(rank, status))

    def tell(self, event: Event) -> None:
        self.watch(hand_over(self.supervisor, event, self.now))

    def pass_time(self, seconds: float) -> None:
        self.halt()
        self.now += seconds
        if self.supervisor.paused:
            self.paused_s += seconds
        self.watch(self.supervisor.tick(self.now))

    def begin(self, phase: Phase, order: Down) -> None:
        ranks = [rank for rank, state in self.doing.items() if state == "idle"]
        assert self.supervisor.idle == ranks
        self.ordered = set(ranks)
        self.deadline, self.paused_s = self.now + self.limit_s, 0.0
        self.watch(self.supervisor.begin(phase, dict.fromkeys(ranks, order), self.deadline))

    def wind_up(self) -> None:
        """Deliver the ends of killed ranks and let time pass until all is settled."""
        if self.supervisor.paused:  # the user leaves the debugger: the one wait without a bound
            assert self.holder is not None
            self.end(self.holder, 1)
        for _ in range(100):
            for rank, state in list(self.doing.items()):
                if state == "killed" and rank not in self.unkillable:
                    self.end(rank, -signal.SIGKILL)
            self.halt()
            if self.supervisor.settled:
                if not self.supervisor.deaths.stopped:
                    return
                self.watch(self.supervisor.dismiss(self.now))
                continue
            wake_at = self.supervisor.wake_at()
            assert wake_at < math.inf, "the supervisor waits for ever"
            self.pass_time(max(0.0, wake_at - self.now))
        raise AssertionError("the supervisor is woken without end")

    def check_settled(self) -> None:
        """Each rank of the phase is accounted for, and none is said to be alive that is not."""
        kinds = {(f.rank, f.kind) for f in self.supervisor.failures}
        failed = {rank for rank, _ in kinds}
        lost = self.supervisor.deaths.lost
        assert lost.keys() <= self.asked
        for rank in self.ordered:
            said = rank in self.supervisor.done or rank in failed
            assert said or rank in lost or rank in self.stopped
        for rank, state in self.doing.items():
            assert state in ("idle", "killed", "gone") or rank in self.stopped
            if state == "killed" and rank in self.ordered:
                assert (rank, "lost") in kinds
        assert self.supervisor.busy == []


STEPS_S = st.sampled_from([0.0, 0.015625, STACKS_S, CLOSED_S, GRACE_S, 3.0, LOST_S, 40.0])
TAME: list[Intent] = [
    "pass", "pass", "fail", "meet", "meet", "diverge", "debug", "prepare", "ready", "report",
]  # fmt: skip
WILD: list[Intent] = ["babble", "die", "leave", "close", "flood"]
ASKED: list[Intent] = [
    "announce", "kill", "pause", "resume", "kill next", "pause next", "resume next",
]  # fmt: skip
Step = tuple[int, Intent] | float | Literal["call", "leave", "interrupt", "abandon"]


@dataclass(frozen=True, slots=True)
class History:
    """A drawn history, for a witness to go through."""

    witness: Witness
    steps: list[Step]

    def play(self, after_each: Callable[[Witness], None] = lambda _: None) -> None:
        witness = self.witness
        for step in self.steps:
            match step:
                case float():
                    witness.pass_time(step)
                case "interrupt":
                    witness.watch(witness.supervisor.interrupt(witness.now))
                case "abandon":
                    witness.doing = dict.fromkeys(witness.doing, "gone")
                    witness.supervisor.abandon("the zygote is gone", witness.now)
                case "call" | "leave":
                    witness.halt()
                    if witness.supervisor.settled:
                        witness.watch(witness.supervisor.dismiss(witness.now))
                    if witness.supervisor.settled:
                        witness.check_settled()
                        witness.begin(
                            "call" if step == "call" else "finish",
                            Go("call") if step == "call" else Leave(),
                        )
                case (rank, intent):
                    witness.act(rank % len(witness.doing), intent)
            after_each(witness)


@st.composite
def histories(draw: st.DrawFn) -> History:
    size = draw(st.integers(1, 4))
    unkillable = draw(st.frozensets(st.integers(0, size - 1), max_size=1))
    witness = Witness(size, unkillable, draw(st.sampled_from([5.0, LIMIT_S])))
    ranks = st.integers(0, size - 1)
    tame: st.SearchStrategy[Step] = st.tuples(ranks, st.sampled_from(TAME))
    rest: st.SearchStrategy[Step] = st.one_of(
        STEPS_S,
        st.tuples(ranks, st.sampled_from(WILD)),
        st.tuples(ranks, st.sampled_from(ASKED)),
        st.sampled_from(["call", "leave"]),
    )
    boot: list[Step] = [(rank, "pass") for rank in range(size)]
    opening: list[Step] = [*boot, "call"] if draw(st.booleans()) else []
    drawn = draw(st.lists(st.one_of(*[tame] * 5, rest), min_size=4, max_size=40))
    ends: list[list[Step]] = [[], [], ["interrupt"], ["abandon"]]
    return History(witness, [*opening, *drawn, *draw(st.sampled_from(ends))])


@settings(max_examples=150, deadline=None)
@given(histories())
def test_any_history_settles_in_bounded_time_with_every_rank_accounted_for(
    history: History,
) -> None:
    witness = history.witness
    history.play()
    limit = max(witness.now, witness.deadline + witness.paused_s)
    witness.wind_up()
    # At worst a socket closed just before the limit, then stacks are taken, and then a rank can not
    # be killed; or one lives on after the end that it announced.
    limit += witness.allowed_s
    assert witness.now <= limit + OWED_S + STACKS_S + CLOSED_S + 2 * LOST_S + 0.001
    witness.check_settled()


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_nothing_is_left_to_do_at_once_after_a_tick(history: History) -> None:
    def look(witness: Witness) -> None:
        witness.pass_time(0.0)
        assert witness.supervisor.wake_at() > witness.now

    history.play(after_each=look)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_a_rank_that_was_killed_or_died_never_answers_again(
    history: History,
) -> None:
    answered: dict[int, Done] = {}

    def look(witness: Witness) -> None:
        for rank, said in witness.supervisor.done.items():
            assert witness.doing[rank] == "idle" or said is answered.get(rank)
        answered.clear()
        answered.update(witness.supervisor.done)

    history.play(after_each=look)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_nobody_waits_at_an_exchange_for_a_rank_that_will_not_come(
    history: History,
) -> None:
    def look(witness: Witness) -> None:
        awaited = {s for rank, s in witness.doing.items() if rank not in witness.asked}
        if any("meeting" in state for state in witness.doing.values()):
            assert not {"idle", "killed", "gone"} & awaited
            assert {"running", "asking", "debugging"} & awaited

    history.play(after_each=look)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_time_that_passes_in_the_debugger_ends_nobody(history: History) -> None:
    def look(witness: Witness) -> None:
        witness.halt()
        if witness.supervisor.paused:
            before = dict(witness.doing)
            witness.pass_time(1000.0)
            assert witness.doing == before

    history.play(after_each=look)
