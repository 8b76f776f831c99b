"""From raw samples to medians, targets and the text of the tables.

All of it is pure (no I/O) but for `show`, which draws the rows with rich.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from methods import (
    FORK,
    FORK_TUNED,
    FRESH,
    GIVEN,
    IMPORT,
    ONE_PROCESS,
    REPAIR,
    SPAWN,
    START_TESTS,
    TARGET_SIZE,
    WARM,
    WITH,
    WITHOUT,
    Case,
    Timing,
)
from rich.console import Console
from rich.table import Table

ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a case in one round."""

    round: int
    """The round, from 0."""
    case: Case
    """The timed case."""
    timing: Timing
    """The figures of the run."""


@dataclass(frozen=True, slots=True)
class Median:
    """The runs of a case, summarised in ms."""

    ms: float
    """The median over the runs of each run's median."""
    low_ms: float
    """The lowest of the runs' medians."""
    high_ms: float
    """The highest of the runs' medians."""
    first_ms: float | None
    """The median of the first worlds, or None where nothing is paid once."""
    runs: int
    """How many runs there were."""


@dataclass(frozen=True, slots=True)
class Target:
    """One promise about speed, and whether it was kept."""

    text: str
    """The promise."""
    measured: str
    """The measured figure; meaningless if nothing was measured."""
    passed: bool | None
    """Whether it was kept; None where it was not measured."""


Medians = Mapping[Case, Median]
Rows = Sequence[Sequence[str]]


def medians(samples: Sequence[Sample]) -> dict[Case, Median]:
    """The median of each case that has samples."""
    by_case: dict[Case, list[Timing]] = {}
    for sample in samples:
        by_case.setdefault(sample.case, []).append(sample.timing)
    return {case: _median(timings) for case, timings in by_case.items()}


def _median(timings: Sequence[Timing]) -> Median:
    runs_ms = [statistics.median(timing.each_ms) for timing in timings]
    firsts_ms = [timing.first_ms for timing in timings if timing.first_ms is not None]
    return Median(
        ms=statistics.median(runs_ms),
        low_ms=min(runs_ms),
        high_ms=max(runs_ms),
        first_ms=statistics.median(firsts_ms) if firsts_ms else None,
        runs=len(runs_ms),
    )


def ratio(found: Medians, over: Case, under: Case) -> float | None:
    """How many times the one median is the other, or None where one of them was not measured."""
    if over not in found or under not in found:
        return None
    return found[over].ms / found[under].ms


def difference_ms(found: Medians, tests: int) -> float | None:
    """The time that the plugin adds to a session of ordinary tests, or None if not measured."""
    on, off = Case(WITH, "ordinary", tests), Case(WITHOUT, "ordinary", tests)
    return found[on].ms - found[off].ms if on in found and off in found else None


WORLD_COLUMNS = (
    "ranks",
    "workload",
    "torch spawn",
    "bare fork",
    "fork, huge pages",
    "ours, fresh",
    "ours, warm",
    "fresh / fork",
    "fresh / huge",
    "spawn / fresh",
    "first fresh",
)


def world_rows(found: Medians) -> Rows:
    """One row for each size and workload; times are ms for one test or world."""
    others = ("ordinary", "examples", "short")
    keys = sorted({(case.workload, case.size) for case in found if case.workload not in others})
    return [_world_row(found, workload, size) for workload, size in keys]


def _world_row(found: Medians, workload: str, size: int) -> list[str]:
    spawn, fork, tuned, fresh, warm = (
        Case(method, workload, size) for method in (SPAWN, FORK, FORK_TUNED, FRESH, WARM)
    )
    return [
        str(size),
        workload,
        *(_spread(found.get(case)) for case in (spawn, fork, tuned, fresh, warm)),
        _times(ratio(found, fresh, fork)),
        _times(ratio(found, fresh, tuned)),
        _times(ratio(found, spawn, fresh)),
        _number(found[fresh].first_ms if fresh in found else None),
    ]


PLAIN_COLUMNS = ("ordinary tests", WITHOUT, WITH, "added", "added a test", "import alone")


def plain_rows(found: Medians) -> Rows:
    """One row for each length of a session of ordinary tests; times are ms for the session."""
    sizes = sorted({case.size for case in found if case.workload == "ordinary"})
    return [_plain_row(found, tests) for tests in sizes]


def _plain_row(found: Medians, tests: int) -> list[str]:
    added_ms = difference_ms(found, tests)
    return [
        f"{tests:,}",
        *(_spread(found.get(Case(method, "ordinary", tests))) for method in (WITHOUT, WITH)),
        _number(added_ms),
        _number(None if added_ms is None or tests == START_TESTS else added_ms / tests, digits=3),
        _spread(found.get(Case(IMPORT, "ordinary", tests))),
    ]


SHORT_COLUMNS = (
    "tests that use torch",
    "session in one process",
    f"in worlds of {TARGET_SIZE}",
    "added",
)


def short_rows(found: Medians) -> Rows:
    """One row for each length of a session of tests that use torch; ms for the session."""
    rows = []
    for tests in sorted({case.size for case in found if case.workload == "short"}):
        plain, ours = (found.get(Case(method, "short", tests)) for method in (WITHOUT, FRESH))
        added_ms = ours.ms - plain.ms if ours is not None and plain is not None else None
        rows.append([str(tests), _spread(plain), _spread(ours), _number(added_ms)])
    return rows


EXAMPLE_COLUMNS = ("@given in", "an example", "added")


def example_rows(found: Medians) -> Rows:
    """One row for each size of world, and one without; times are ms for one example."""
    alone = Case(GIVEN, "examples", ONE_PROCESS)
    rows = []
    cases = [case for case in found if case.method in (GIVEN, REPAIR)]
    for case in sorted(cases, key=lambda case: (case.method == REPAIR, case.size)):
        where = "one process" if case == alone else f"{case.size} rank{'s' * (case.size > 1)}"
        where += " of a world that is repaired for it" * (case.method == REPAIR)
        added_ms = found[case].ms - found[alone].ms if case != alone and alone in found else None
        rows.append([where, _number(found[case].ms, digits=2), _number(added_ms, digits=2)])
    return rows


def _number(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"


def _spread(median: Median | None) -> str:
    if median is None:
        return ABSENT
    half_range = (median.high_ms - median.low_ms) / 2 / median.ms
    return _number(median.ms) if median.runs == 1 else f"{_number(median.ms)} ±{half_range:.0%}"


def _times(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.2f}x"


def targets(found: Medians, samples: Sequence[Sample]) -> list[Target]:
    """Each promise about speed, with what was measured."""
    spawn, fork, tuned, fresh, warm = (
        Case(method, "all_reduce", TARGET_SIZE) for method in (SPAWN, FORK, FORK_TUNED, FRESH, WARM)
    )
    faster, over_fork = ratio(found, spawn, fresh), ratio(found, fresh, fork)
    warm_ms = found[warm].ms if warm in found else None
    over_tuned = f"{_times(ratio(found, fresh, tuned))} the huge-page fork"
    return [
        Target(
            f"a fresh {TARGET_SIZE}-rank world at least 80x faster than {SPAWN}",
            _times(faster),
            None if faster is None else faster >= 80,
        ),
        Target(
            f"a fresh {TARGET_SIZE}-rank world at most 1.5x the bare fork",
            f"{_times(over_fork)}; {over_tuned}",
            None if over_fork is None else over_fork <= 1.5,
        ),
        *(_workload_target(found, workload) for workload in ("dtensor", "fsdp2")),
        Target(
            f"a test in a warm {TARGET_SIZE}-rank world at most 6 ms",
            f"{_number(warm_ms)} ms",
            None if warm_ms is None else warm_ms <= 6,
        ),
        *_example_targets(found),
        _start_target(found, samples),
    ]


def _workload_target(found: Medians, workload: str) -> Target:
    fork = Case(FORK, "all_reduce", TARGET_SIZE)
    over_fork = ratio(found, Case(FRESH, workload, TARGET_SIZE), fork)
    over_own = ratio(found, Case(FRESH, workload, TARGET_SIZE), Case(FORK, workload, TARGET_SIZE))
    return Target(
        f"a {workload} test in a fresh {TARGET_SIZE}-rank world at most 3x the bare fork",
        f"{_times(over_fork)}; {_times(over_own)} a bare fork with the same workload",
        None if over_fork is None else over_fork <= 3,
    )


def _example_targets(found: Medians) -> list[Target]:
    alone, ours = (Case(GIVEN, "examples", size) for size in (ONE_PROCESS, TARGET_SIZE))
    repaired = Case(REPAIR, "examples", TARGET_SIZE)
    added_ms = found[ours].ms - found[alone].ms if {alone, ours} <= found.keys() else None
    repair_ms = found[repaired].ms - found[ours].ms if {repaired, ours} <= found.keys() else None
    return [
        Target(
            f"an example of Hypothesis in {TARGET_SIZE} ranks at most 2 ms over one in one process",
            f"{_number(added_ms, digits=2)} ms",
            None if added_ms is None else added_ms <= 2,
        ),
        Target(
            f"a {TARGET_SIZE}-rank world repaired for the next example in at most 100 ms",
            f"{_number(repair_ms)} ms",
            None if repair_ms is None else repair_ms <= 100,
        ),
    ]


def _start_target(found: Medians, samples: Sequence[Sample]) -> Target:
    """Judges the whole start-up (import and configuration), which is no less than the import.

    The fastest sessions are compared: on a loaded machine sessions differ by more than is judged,
    and load only ever adds time.
    """
    text = "under 20 ms of import and no torch for a suite without the marker"
    on, off, alone = (
        found.get(Case(method, "ordinary", START_TESTS)) for method in (WITH, WITHOUT, IMPORT)
    )
    torch_seen = [
        bool(sample.timing.notes["torch_imported"])
        for sample in samples
        if sample.case.method in (WITH, IMPORT)
    ]
    if on is None or off is None or alone is None:
        return Target(text, ABSENT, None)
    added_ms = on.low_ms - off.low_ms
    return Target(
        text,
        f"{_number(added_ms)} ms more in the fastest session ({_number(on.ms - off.ms)} in the "
        f"median), import alone {_number(alone.ms)} ms, torch imported in {sum(torch_seen)} of "
        f"{len(torch_seen)} runs",
        added_ms < 20 and not any(torch_seen),
    )


TARGET_COLUMNS = ("target", "measured", "")


def target_rows(judged: Sequence[Target]) -> Rows:
    """One row for each target."""
    words = {True: "pass", False: "MISS", None: "not measured"}
    return [
        [
            target.text,
            ABSENT if target.passed is None else target.measured,
            words[target.passed],
        ]
        for target in judged
    ]


def markdown(columns: Sequence[str], rows: Rows) -> str:
    """The rows as a table of GitHub's markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(console: Console, title: str, columns: Sequence[str], rows: Rows) -> None:
    """Draws the rows on the console."""
    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)
