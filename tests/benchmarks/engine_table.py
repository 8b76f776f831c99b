"""From the answers of the engine's cases to medians, verdicts and rows of text. Pure (no I/O)."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine_cases import Case, Goal

ABSENT = "-"
NOT_RUN = "not run"
COLUMNS = ("case", "place", "compared", "over, ms", "under, ms", "measured", "target", "met?")


@dataclass(frozen=True, slots=True)
class Spread:
    """A method's times in one case, in ms."""

    median: float
    low: float
    first_quartile: float
    third_quartile: float
    high: float
    runs: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal of a case, and what was measured."""

    case: Case
    goal: Goal
    over_ms: float | None
    under_ms: float | None
    measured: float | None
    """The ratio, or the number; None: not run."""

    @property
    def met(self) -> bool | None:
        """Whether the promise was kept; None where there is none or it was not measured."""
        if self.goal.limit is None or self.measured is None:
            return None
        if self.goal.at_most:
            return self.measured <= self.goal.limit
        return self.measured >= self.goal.limit


def spread(times_ms: Sequence[float]) -> Spread:
    """Median, extremes and quartiles of at least one time."""
    first, middle, third = (
        statistics.quantiles(times_ms, n=4, method="inclusive")
        if len(times_ms) > 1
        else [times_ms[0]] * 3
    )
    return Spread(middle, min(times_ms), first, third, max(times_ms), len(times_ms))


def judged(case: Case, answer: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts on a case's goals."""
    median = {name: spread(times).median for name, times in answer["ms"].items() if times}
    found = []
    for goal in case.goals:
        if goal.note is not None:
            found.append(Verdict(case, goal, None, None, answer["notes"].get(goal.note)))
            continue
        over, under = median.get(goal.over), median.get(goal.under)
        measured = None if over is None or under is None else over / under
        found.append(Verdict(case, goal, over, under, measured))
    return found


def row(verdict: Verdict) -> list[str]:
    """The verdict as a row of the table."""
    case, goal = verdict.case, verdict.goal
    words = {True: "yes", False: "NO", None: ABSENT}
    times = goal.note is None
    return [
        case.name,
        case.place,
        f"{goal.over} / {goal.under}" if goal.note is None else goal.note,
        _ms(verdict.over_ms) if times else ABSENT,
        _ms(verdict.under_ms) if times else ABSENT,
        NOT_RUN if verdict.measured is None else _number(goal, verdict.measured),
        ABSENT
        if goal.limit is None
        else f"{'<=' if goal.at_most else '>='} {_number(goal, goal.limit)}",
        words[verdict.met],
    ]


def _ms(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:,.2f}"


def _number(goal: Goal, value: float) -> str:
    return f"{value:,.2f}x" if goal.note is None else f"{value:.4f}"
