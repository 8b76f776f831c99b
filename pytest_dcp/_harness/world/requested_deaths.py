"""Deaths and stops of ranks that the test itself asked for. Pure (no I/O).

Enters: requests, and the ends and stops of processes. Leaves: which ranks are stopped or lost as
requested, and which requesters get their answer.

Rules:

- Only the requested event is excused: a rank that was to be stopped, and dies first, has crashed.
- The requested event must happen: it is a failure if the rank survives.
- A rank that continues after its stop has fulfilled the request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pytest_dcp._harness.protocol.messages import FaultAct, FaultAnswer, FaultAsk
from pytest_dcp.errors import LostRank

OWED_S = 5.0
"""How long a rank may survive after its end was requested or announced: the kernel needs
milliseconds, a loaded machine longer."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A requested end."""

    kind: Literal["kill", "pause", "announced"]
    """announced: the rank itself says that it is about to end or stop."""
    why: str
    """The call that requested it."""
    since_s: float
    """When, on the clock of the deadlines."""


@dataclass(slots=True)
class Deaths:
    """The requested ends of one world's ranks."""

    size: int
    wishes: dict[int, Wish] = field(default_factory=dict)
    """By rank; only of ranks whose process is alive."""
    stopped: set[int] = field(default_factory=set)
    """Ranks that are stopped, as requested."""
    resuming: set[int] = field(default_factory=set)
    """Ranks that must continue, even if they have yet to stop."""
    lost: dict[int, LostRank] = field(default_factory=dict)
    """Ranks that ended, as requested."""
    _asking: dict[int, FaultAsk] = field(default_factory=dict)
    """By rank, the request whose answer it waits for."""

    def survivors(self, gone_ranks: Iterable[int]) -> tuple[int, ...]:
        """Ranks with a process that no request is to end or stop, or that has continued."""
        out = self.wishes.keys() | self.lost.keys() | set(gone_ranks)
        return tuple(rank for rank in range(self.size) if rank not in out)

    @property
    def owing(self) -> list[int]:
        """Ranks that a request ends and that may still run. No rank can decline a kill."""
        return [
            rank
            for rank, wish in self.wishes.items()
            if rank not in self.stopped and wish.kind != "kill"
        ]

    def overdue(self, now: float) -> list[int]:
        """Ranks that should have ended or stopped by now."""
        return [rank for rank in self.owing if now >= self.wishes[rank].since_s + OWED_S]

    def due_at(self) -> float:
        """When the next rank becomes overdue; inf: never."""
        return min((self.wishes[r].since_s + OWED_S for r in self.owing), default=float("inf"))

    def postpone(self, seconds: float) -> None:
        """Postpone the limits by the time for which the clock stood still."""
        self.wishes = {
            rank: Wish(wish.kind, wish.why, wish.since_s + seconds)
            for rank, wish in self.wishes.items()
        }

    def see_stop_change(self, rank: int, *, stopped: bool) -> None:
        """A rank's process was stopped, or goes on after a stop."""
        if stopped and rank in self.wishes:
            self.stopped.add(rank)
        elif not stopped:  # the kernel may report only the end of a stop
            self.forgive(rank)

    def forgive(self, rank: int) -> None:
        """The rank has fulfilled the request, or need not any more."""
        self.wishes.pop(rank, None)
        self.stopped.discard(rank)
        self.resuming.discard(rank)

    def see_end(self, rank: int, how: str) -> bool:
        """Record that a rank's process ended; returns whether that was requested. how: in words."""
        wish = self.wishes.get(rank)
        was_stopped = rank in self.stopped
        self.forgive(rank)
        self.silence(rank)
        if wish is None or (wish.kind == "pause" and not was_stopped):
            return False
        text = f"was stopped as asked: {wish.why}; then it {how}" if was_stopped else ""
        self.lost[rank] = LostRank(rank, text or f"{how} as asked: {wish.why}")
        return True

    def silence(self, rank: int) -> None:
        """Drop the rank's request: it can no longer receive an answer."""
        self._asking.pop(rank, None)

    def ask(self, asker: int, message: FaultAsk) -> None:
        """A rank waits until its requested fault has happened."""
        self._asking[asker] = message

    def answers(self, gone_ranks: Iterable[int]) -> list[tuple[int, FaultAnswer]]:
        """The answers that are due, each with its requester. gone_ranks: without a process."""
        gone_ranks = set(gone_ranks)
        ready = [
            (asker, ask) for asker, ask in self._asking.items() if self.is_done(ask, gone_ranks)
        ]
        for asker, _ in ready:
            del self._asking[asker]
        return [(asker, self._answer(ask, gone_ranks)) for asker, ask in ready]

    def is_done(self, ask: FaultAsk, gone_ranks: Iterable[int]) -> bool:
        """Whether the requested fault has happened, or cannot happen any more."""
        has_happened: dict[FaultAct, bool] = {
            "kill": False,
            "pause": ask.rank not in self.owing,
            "resume": ask.rank not in self.wishes,
            "look": True,
        }
        return ask.rank in gone_ranks or has_happened[ask.act]

    def _answer(self, ask: FaultAsk, gone_ranks: set[int]) -> FaultAnswer:
        if ask.act in ("pause", "resume") and ask.rank in gone_ranks:
            return FaultAnswer(error=f"rank {ask.rank} is gone: there is nothing to {ask.act}")
        return FaultAnswer(survivors=self.survivors(gone_ranks))
