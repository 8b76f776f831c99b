"""Deaths and stops of ranks that the test itself asked for. Pure (no I/O).

Enters: requests, and the ends and stops of processes. Leaves: which ranks are stopped or lost as
requested, and which requesters can receive their answer.

Rules that hold inside:

- Only the requested event is forgiven: a rank that should stop, and dies before that, has crashed.
- The requested event must happen: a rank that lives on is a failure.
- A rank that continues after its stop has met the request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pytest_dcp._harness.protocol.messages import FaultAct, FaultAnswer, FaultAsk
from pytest_dcp.errors import LostRank

OWED_S = 5.0
"""How long a rank may live on after its end was asked for or announced: the kernel needs
milliseconds, a loaded machine may take its time."""


@dataclass(frozen=True, slots=True)
class Wish:
    """An end that was asked for."""

    kind: Literal["kill", "pause", "announced"]
    """announced: by the rank itself, which is about to do it, whichever it is."""
    why: str
    """Who asked, and where in the code."""
    since_s: float
    """When, on the clock that deadlines go by."""


@dataclass(slots=True)
class Deaths:
    """The book of one world."""

    size: int
    wishes: dict[int, Wish] = field(default_factory=dict)
    """By rank, of ranks with a living process."""
    stopped: set[int] = field(default_factory=set)
    """Ranks that are stopped as asked."""
    resuming: set[int] = field(default_factory=set)
    """Ranks that are to go on, also when they are only about to stop."""
    lost: dict[int, LostRank] = field(default_factory=dict)
    """Ranks that ended as asked."""
    _asking: dict[int, FaultAsk] = field(default_factory=dict)
    """By rank, the fault that it waits for."""

    def survivors(self, gone_ranks: Iterable[int]) -> tuple[int, ...]:
        """Ranks with a process that was not asked to end or stop, or that went on."""
        out = self.wishes.keys() | self.lost.keys() | set(gone_ranks)
        return tuple(rank for rank in range(self.size) if rank not in out)

    @property
    def owing(self) -> list[int]:
        """Ranks whose end was asked for, and that may still run; a kill is never declined."""
        return [
            rank
            for rank, wish in self.wishes.items()
            if rank not in self.stopped and wish.kind != "kill"
        ]

    def overdue(self, now: float) -> list[int]:
        """Ranks that should be gone or stopped by now."""
        return [rank for rank in self.owing if now >= self.wishes[rank].since_s + OWED_S]

    def due_at(self) -> float:
        """When the next rank is overdue; inf for never."""
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
        """The rank has met the request."""
        self.wishes.pop(rank, None)
        self.stopped.discard(rank)
        self.resuming.discard(rank)

    def see_end(self, rank: int, how: str) -> bool:
        """A rank's process is gone; whether that was asked for. `how` is its end in words."""
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
        """The rank can no longer receive an answer."""
        self._asking.pop(rank, None)

    def ask(self, asker: int, message: FaultAsk) -> None:
        """A rank waits until its requested fault has happened."""
        self._asking[asker] = message

    def answers(self, gone_ranks: Iterable[int]) -> list[tuple[int, FaultAnswer]]:
        """(requester, answer) of requesters that need not wait any longer; `gone_ranks` have no
        process.
        """
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
