"""The supervisor against replayed histories: a fake clock, fake processes, every order recorded.

A history says what ranks do and when. `Replay` is the world around the supervisor: it wakes the
supervisor at the times it asks for, carries out its kills on processes that end a little later, and
records its orders with the time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_dcp._harness.protocol.messages import (
    DebugAsk,
    DebugDone,
    Done,
    Down,
    FaultAct,
    Go,
    Met,
    Phase,
    RankOutcome,
    Up,
)
from pytest_dcp._harness.world.rank_states import (
    Action,
    Continue,
    KillRank,
    Send,
    StopRank,
)
from pytest_dcp._harness.world.supervisor import Supervisor
from pytest_dcp._harness.world.terminal import Terminal

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
            return supervisor.hear(rank, message, now)
        case Ends(rank, status):
            return supervisor.see_exit(rank, status, now)
        case Closes(rank, exiting):
            return supervisor.see_close(rank, now, exiting=exiting)
        case Floods(rank, size_bytes):
            return supervisor.see_flood(rank, size_bytes, now)
        case Halts(rank, stopped):
            return supervisor.see_stop_change(rank, now, stopped=stopped)
        case Strikes(act, rank):
            return supervisor.apply_fault(act, rank, f"{act}({rank}) by the test", now)
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
        replay.play([(T0, Says(rank, make_result("boot"))) for rank in range(size)])
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

    # Queries for tests.

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
        """Rank -> reason, of the ranks whose death was requested."""
        return {rank: one.reason for rank, one in self.supervisor.deaths.lost.items()}

    def dismiss(self) -> None:
        """End a phase as the world does."""
        assert self.supervisor.settled
        self._note(self.supervisor.dismiss(self.now))
        self.play([])

    def summary(self, rank: int) -> str:
        (text,) = [f.summary for f in self.supervisor.failures if f.rank == rank]
        return text


def make_result(phase: Phase = "call", outcome: RankOutcome = "passed", at_s: float = T0) -> Done:
    return Done(phase, outcome, at_s, text="ValueError: 3" if outcome == "failed" else "")


FAILED = make_result(outcome="failed", at_s=99.5)
PASSED = make_result()


RAISED = make_result(outcome="interrupt")


def error_to(replay: Replay, rank: int) -> str:
    """The error of the one `Met` that the rank got."""
    (answer,) = replay.sent(rank)
    assert isinstance(answer, Met)
    assert answer.values() == []
    return answer.error


def debugged(start: float, end: float, rank: int = 0) -> list[tuple[float, Event]]:
    """A rank has the terminal for a while."""
    return [(T0 + start, Says(rank, DebugAsk("set_trace"))), (T0 + end, Says(rank, DebugDone()))]
