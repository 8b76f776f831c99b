"""When a world's ranks are due: to answer, to write their stacks, to be killed. Pure (no I/O).

Enters: begins, ends and the time. Leaves: the actions that are due, and when to look again.

Rules that hold inside:

- Every wait has a bound. A phase ends at its deadline, which moves while ranks prepare it.
- After a failure, or at the deadline, ranks are asked for their stacks (`take_stacks_due`); they
  have `STACKS_S` to write them, and are killed then (`take_kill_due`).
- While a rank has the terminal every clock stands still; afterwards all are put off by the pause.
"""

from __future__ import annotations

from pytest_dcp._harness.protocol.messages import At, Phase
from pytest_dcp._harness.protocol.places import NEVER, REPORT_S, RankPlaces
from pytest_dcp._harness.world.interrupt_clock import Interruption
from pytest_dcp._harness.world.rank_states import RankState

STACKS_S = 0.2
"""How long a rank gets to write its stacks: faulthandler needs about a millisecond, a loaded
machine may take its time to schedule it."""
CLOSED_S = 0.25
"""How long after its socket closed a rank's exit may still come, and name the real cause."""
EXITING_S = 10.0
"""The same if the kernel has begun to end the process: it closes the socket early, and frees a
large memory page by page.
"""
LOST_S = 10.0
"""How long a SIGKILLed process may take to go away: a large one is torn down page by page."""
INF = float("inf")
"""Never."""


class Timers:
    """The clocks of one world. Times are in seconds, on the caller's clock; `INF` is never."""

    def __init__(self, grace_s: float) -> None:
        self.deadline = INF
        """Of the phase; later by as long as a debugger had the terminal."""
        self.places = RankPlaces()
        self.interruption = Interruption()
        self.timed_out = False
        """Whether the phase has reached its deadline."""
        self.prepared_too_long = False
        """Whether ranks have reached the limit of what comes before the phase itself."""
        self.grace_s = grace_s
        """How long the peers of a failed rank may go on."""
        self._stacks_at = INF
        self._kill_at = INF
        self._lost_at = INF
        self._closed: dict[int, float] = {}
        """Ranks whose socket closed, and until when their exit may come."""
        self._paused_at: float | None = None

    # Phases.

    def begin_phase(self, deadline: float) -> None:
        """A phase begins; nothing of the last one is due any more."""
        self.deadline = deadline
        self._stacks_at = self._kill_at = INF
        self.timed_out = self.prepared_too_long = False
        self.places.begin()
        self.interruption.end()

    def cut_off(self, phase: Phase, now: float) -> None:
        """The session interrupts the phase."""
        self._stacks_at = self.interruption.begin(phase, now)

    def end_soon(self, now: float) -> None:
        """A rank cannot pass: its peers get the grace, and no more."""
        if self._kill_at == INF and not self.timed_out and not self.interruption.is_on:
            self._stacks_at = min(self._stacks_at, self.clock(now) + self.grace_s)

    def stop(self) -> None:
        """No rank is left."""
        self._closed.clear()
        self._paused_at = None
        self._stacks_at = self._kill_at = self._lost_at = INF
        self.interruption.end()

    # Ranks.

    def move_place(self, rank: int, at: At, now: float) -> None:
        """A rank reports its place."""
        self.deadline += self.places.move(rank, at, self.clock(now))

    def leave_place(self, rank: int, now: float) -> None:
        """A rank has ended its work outside the phase itself, or has ended."""
        self.deadline += self.places.leave(rank, self.clock(now))

    def close(self, rank: int, now: float, *, exiting: bool) -> None:
        """A rank's socket closed: wait for its exit, which is known to follow if `exiting`."""
        if exiting:
            self._closed[rank] = self.clock(now) + EXITING_S
        self._closed.setdefault(rank, self.clock(now) + CLOSED_S)

    def forget_closed(self, rank: int) -> None:
        """A rank's exit has come, or it was killed."""
        self._closed.pop(rank, None)

    def await_death(self, now: float) -> None:
        """A rank was killed."""
        self._lost_at = self.clock(now) + LOST_S

    def end_deaths(self) -> None:
        """Every rank that was killed is gone."""
        self._lost_at = INF

    def spare(self, until: float) -> None:
        """Ask for stacks again then: a rank may go on for a while."""
        self._stacks_at = min(self._stacks_at, until)

    def spared_until(self, rank: int, state: RankState) -> float:
        """When the time of a rank that should have ended is over."""
        if self.interruption.is_on:
            return self.interruption.limit_at(rank)
        return self.places.report_due_at(rank) if state is RankState.RUNNING else NEVER

    # The pause.

    @property
    def paused(self) -> bool:
        """Whether a rank has the terminal, and so the clocks stand still."""
        return self._paused_at is not None

    def clock(self, now: float) -> float:
        """The time that deadlines are compared with; it stops while a rank has the terminal."""
        return now if self._paused_at is None else self._paused_at

    def pause(self, now: float) -> None:
        """A rank gets the terminal."""
        self._paused_at = now

    def resume(self, now: float) -> float:
        """Let the clocks go on; returns for how long they stood still, 0 if they did not."""
        if self._paused_at is None:
            return 0.0
        pause_s = now - self._paused_at
        self._paused_at = None
        self.deadline += pause_s
        self.places.postpone(pause_s)
        self._stacks_at += pause_s
        self._kill_at += pause_s
        self._lost_at += pause_s
        self._closed = {rank: at + pause_s for rank, at in self._closed.items()}
        return pause_s

    # Due actions.

    def wake_at(self, *, busy: bool, deaths_due_at: float) -> float:
        """When something is due if nothing happens before; `busy`: ranks owe an answer."""
        if self.paused:
            return INF
        # Once reached, a deadline is not due again: its ranks have a time to be killed at by then.
        waits = busy and not self.timed_out
        deadline = self.places.limit_at(self.deadline) if waits else INF
        again = self.interruption.due_at() if busy else INF
        failing = self.places.failing_due_at()
        due = [deadline, self._stacks_at, self._kill_at, self._lost_at, deaths_due_at, again]
        return min([*due, failing, *self._closed.values()])

    def closed_due(self, now: float) -> list[int]:
        """Ranks whose exit should have followed the end of their socket by now."""
        return [rank for rank, until in self._closed.items() if now >= until]

    def check_limits(self, now: float, *, busy: bool) -> None:
        """Let stacks be due at once where the phase, or a rank with an error, is at its limit."""
        if now >= self.places.limit_at(self.deadline) and busy and not self.timed_out:
            self.timed_out = True
            self.prepared_too_long = self.places.is_preparing
            self._stacks_at = now
        if self.places.take_failing_due(now) and self._kill_at == INF:
            self._stacks_at = now

    def take_stacks_due(self, now: float) -> bool:
        """Whether ranks are to write their stacks now; their kill is due `STACKS_S` later."""
        if now < self._stacks_at:
            return False
        self._stacks_at = INF
        self._kill_at = now + STACKS_S
        return True

    def take_kill_due(self, now: float) -> bool:
        """Whether ranks that have not answered are to be killed now."""
        if now < self._kill_at:
            return False
        self._kill_at = INF
        return True

    def take_lost_due(self, now: float) -> bool:
        """Whether ranks that were killed and live on are to be given up now."""
        if now < self._lost_at:
            return False
        self._lost_at = INF
        return True

    # In words.

    def describe_report(self, *, failing: bool) -> str:
        """The state of a rank with an error when it was killed."""
        if failing:
            return "it waited for its peers to receive that"
        for_s = "" if self.interruption.is_on else f" for {REPORT_S:g} s"
        return f"it wrote the report of that{for_s}"
