"""The ranks' places in a phase, and their effect on its clocks. Pure (no I/O).

Enters: the ranks' reports of their places (`At`). Leaves: by how much a deadline moves, which ranks
may continue past it, and words for reports.

Rules that hold inside:

- The phase's clock is stopped while any rank prepares it (imports torch, collects the test): a
  slow disk does not make a slow test. It stops for `PREPARE_S` at most.
- A rank that has raised has ended its work: it may write its report for `REPORT_S`, whatever its
  peers do and whatever the time limit is. If it never finishes, its exception is already known.
- A rank with an error may have to wait until its peers have received it. If they hang, they will
  never receive it: after `FAILING_S`, or at an earlier limit, that error is the reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from pytest_dcp._harness.protocol.messages import At

PREPARE_S = 600.0
"""How long ranks may prepare a phase: a slow disk can take minutes to read torch."""
REPORT_S = 20.0
"""How long a rank may write its report: it reads and parses the source of every frame."""
FAILING_S = 20.0
"""How long a rank may wait with an error that its peers have not yet received."""
NEVER = float("-inf")


class RankPlaces:
    """The places of one world's ranks. Times are on the clock of the deadlines."""

    def __init__(self) -> None:
        self._preparing: dict[int, str] = {}
        """By rank, the step for which the phase's clock is stopped."""
        self._preparing_since = 0.0
        self._reporting: dict[int, tuple[At, float]] = {}
        """By rank, the exception that it is reporting, and since when."""
        self._failing: dict[int, tuple[At, float]] = {}
        """By rank, the error with which it waits for its peers, and until when it may wait."""

    def begin(self, preparing: Iterable[int] = (), what: str = "", now: float = 0.0) -> None:
        """A phase begins; these ranks first do `what`."""
        self._preparing = dict.fromkeys(preparing, what)
        self._preparing_since = now
        self._reporting, self._failing = {}, {}

    def move(self, rank: int, at: At, now: float) -> float:
        """A rank reports its place. Returns the seconds by which the deadline moves."""
        match at.place:
            case "preparing":
                if not self._preparing:
                    self._preparing_since = now
                self._preparing[rank] = at.text
            case "reporting":
                self._reporting[rank] = at, now
            case "failing":
                until = self._failing[rank][1] if rank in self._failing else now + FAILING_S
                self._failing[rank] = at, until
            case "agreed":
                self._failing.pop(rank, None)
            case "ready":
                return self.leave(rank, now)
        return 0.0

    def leave(self, rank: int, now: float) -> float:
        """A rank works in the phase, has ended it or is gone; the result is as for `move`."""
        self._reporting.pop(rank, None)
        self._failing.pop(rank, None)
        if self._preparing.pop(rank, None) is None or self._preparing:
            return 0.0
        return now - self._preparing_since

    def postpone(self, seconds: float) -> None:
        """Postpone the limits by the time for which the clock was stopped."""
        self._preparing_since += seconds
        self._reporting = {
            rank: (at, at_s + seconds) for rank, (at, at_s) in self._reporting.items()
        }
        self._failing = {rank: (at, until + seconds) for rank, (at, until) in self._failing.items()}

    @property
    def is_preparing(self) -> bool:
        """Whether the phase's clock is stopped."""
        return bool(self._preparing)

    def limit_at(self, deadline: float) -> float:
        """The ranks' limit: the deadline, or the limit of the preparation before it."""
        return self._preparing_since + PREPARE_S if self._preparing else deadline

    def report_due_at(self, rank: int) -> float:
        """When a rank's time to write its report ends; -inf if it writes none."""
        return self._reporting[rank][1] + REPORT_S if rank in self._reporting else NEVER

    def error_of(self, rank: int) -> At | None:
        """The error that a rank is reporting, or waiting with."""
        at, _ = self._reporting.get(rank) or self._failing.get(rank) or (None, 0.0)
        return at

    def failing_due_at(self) -> float:
        """When the first rank will have waited too long with its error; inf if none waits."""
        return min((until for _, until in self._failing.values()), default=float("inf"))

    def take_failing_due(self, now: float) -> bool:
        """Whether a rank has waited too long with its error; returned once for each."""
        due = [rank for rank, (_, until) in self._failing.items() if now >= until]
        for rank in due:
            self._failing[rank] = self._failing[rank][0], float("inf")
        return bool(due)

    def describe(self, rank: int, phase: str) -> str:
        """A rank's activity, to follow the word "still"."""
        return self._preparing.get(rank, f"in {phase}")
