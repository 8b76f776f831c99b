"""The clock of a phase that an interrupt of the controller cuts off. Pure (no I/O).

Enters: that the session ends the phase, and which ranks have received that. Leaves: when ranks are
to be interrupted, and for how long each may go on, in words too.

Rules that hold inside:

- Ranks in a test's setup or call are interrupted: a KeyboardInterrupt lets the test's own `finally`
  blocks run. Ranks that tear down are not: to break that off would lose what comes after it.
- A rank says that it was interrupted, and gets time to end. One that does not say so, and is not
  at work either, hangs where no Python code runs, in a collective for one.
- A signal may come when a rank has not read its order yet, and so it is sent again; a rank acts on
  one per phase.
"""

from __future__ import annotations

from pytest_dcp._harness.protocol.messages import Phase

HEED_S = 1.5
"""How long a rank that is not at work has to say that it was interrupted."""
END_S = 10.0
"""How long ranks that were interrupted, or tear down or exit, may go on with that."""
AGAIN_S = 0.25
"""From one signal to the next."""
NEVER = float("inf")
TORN_DOWN: frozenset[Phase] = frozenset(("teardown", "finish"))
"""Phases that are not interrupted."""


class Interruption:
    """Of one phase at a time. Times are those of the caller's clock."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._again_at = NEVER
        self._is_signalled = False
        self._heeding: set[int] = set()
        """Ranks that have said that they were interrupted."""
        self._worked_at: dict[int, float] = {}
        """When a rank was last seen at work."""

    @property
    def is_on(self) -> bool:
        """Whether the phase is cut off."""
        return self._since is not None

    def begin(self, phase: Phase, now: float) -> float:
        """The phase is cut off; returns when the first of its ranks are at their limit."""
        self._since = now
        self._is_signalled = phase not in TORN_DOWN
        self._again_at = now if self._is_signalled else NEVER
        return now + (HEED_S if self._is_signalled else END_S)

    def end(self) -> None:
        """The phase is over."""
        self._since, self._again_at = None, NEVER
        self._heeding.clear()
        self._worked_at.clear()

    def heed(self, rank: int) -> None:
        """The rank has heard the interrupt."""
        self._heeding.add(rank)

    def see_work(self, rank: int, now: float) -> None:
        """The rank does something."""
        self._worked_at[rank] = now

    def due_at(self) -> float:
        """When ranks that are still at work are to be sent a signal."""
        return self._again_at

    def take_due(self, now: float) -> bool:
        """Whether to send it now; the next is due later."""
        if now < self._again_at:
            return False
        self._again_at = now + AGAIN_S
        return True

    def limit_at(self, rank: int) -> float:
        """Until when the rank may go on; always over where nothing is cut off."""
        if self._since is None:
            return -NEVER
        limit = self._since + END_S
        if not self._is_signalled or rank in self._heeding:
            return limit
        return min(limit, self._worked_at.get(rank, self._since) + HEED_S)

    def describe(self, now: float) -> str:
        """For how long a rank went on, to follow where it is; empty when nothing is cut off."""
        return "" if self._since is None else f" {now - self._since:.1f} s after it was interrupted"
