"""The clock of a phase that an interrupt of the controller cuts off. Pure (no I/O).

Enters: the session's interrupt, and which ranks have received it. Leaves: when to interrupt ranks,
and how long each may continue, in words too.

Rules that hold inside:

- Ranks in a test's setup or call are interrupted: a KeyboardInterrupt lets the test's own `finally`
  blocks run. Ranks that tear down are not: an interrupted teardown would leave out its remaining
  steps.
- A rank reports that it was interrupted, and gets time to end. A rank that does not report it, and
  is not at work either, hangs where no Python code runs, for example in a collective.
- A signal may reach a rank that has not read its order yet, so it is sent again; a rank acts on one
  signal per phase.
"""

from __future__ import annotations

from pytest_dcp._harness.protocol.messages import Phase

HEED_S = 1.5
"""How long a rank that is not at work has to say that it was interrupted."""
END_S = 10.0
"""How long ranks that were interrupted, that tear down or that exit may take to finish."""
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

    def see_interrupted(self, rank: int) -> None:
        """The rank has received the interrupt."""
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
        """When the rank's time ends; in the past if nothing is cut off."""
        if self._since is None:
            return -NEVER
        limit = self._since + END_S
        if not self._is_signalled or rank in self._heeding:
            return limit
        return min(limit, self._worked_at.get(rank, self._since) + HEED_S)

    def describe(self, now: float) -> str:
        """How long a rank continued after the interrupt, as a suffix; empty when nothing is cut
        off.
        """
        return "" if self._since is None else f" {now - self._since:.1f} s after it was interrupted"
