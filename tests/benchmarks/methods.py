"""The methods that are compared, and how each is timed once.

A `Case` says what is timed and is the key of its results; `measure` runs it in processes of its own
and returns a `Timing`. Nothing here knows about rounds, medians or targets.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import processes
import suites

SPAWN = "MultiProcessTestCase"
FORK = "bare fork"
FORK_TUNED = "bare fork, huge pages"
FRESH = 'isolation="test"'
WARM = 'isolation="module"'
WITHOUT = "without the plugin"
WITH = "with the plugin"
IMPORT = "import"
GIVEN = "@given"
REPAIR = "@given, repaired"

PEERS = (SPAWN, FORK, FORK_TUNED)
ISOLATIONS = {FRESH: "test", WARM: "module"}
SWITCHES = {WITHOUT: "no:pytest_dcp", WITH: "pytest_dcp"}

TARGET_SIZE = 4
"""The number of ranks that the targets are about; torch's harness is timed at this size only."""
START_TESTS = 1
EXAMPLE_TESTS = 4
EXAMPLES = 300
"""Of a property, in each of `EXAMPLE_TESTS` tests; the first and the last are not counted."""
REPAIRS = 10
"""As `EXAMPLES`, of a property each of whose examples needs a new world."""
ONE_PROCESS = 0
"""For the size of a world: a property without one."""
ORDINARY_TESTS = 1_000
SHORT_TESTS = 3
"""In the shortest sessions that use torch: in worlds of `TARGET_SIZE`, and in one process."""

IMPORT_SCRIPT = """\
import json, pathlib, sys, time
import pytest
started_s = time.perf_counter()
import pytest_dcp, pytest_dcp.plugin
elapsed_ms = (time.perf_counter() - started_s) * 1e3
notes = {"torch_imported": "torch" in sys.modules}
pathlib.Path("out.json").write_text(json.dumps({"each_ms": [elapsed_ms], "notes": notes}))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is timed."""

    method: str
    """How: one of the names above."""
    workload: str
    """The world's work (a name in `workloads.WORKLOADS`), `ordinary`: tests without a world, or
    `short`: a whole session of a few tests that use torch."""
    size: int
    """The number of ranks; the number of tests in the session where the workload is `ordinary` or
    `short`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The figures of one run of a case."""

    each_ms: list[float]
    """One duration per world, test or session; the first world is not among them."""
    first_ms: float | None = None
    """The duration of the first world, with one-time costs; None if the case has no such costs."""
    notes: dict[str, object] = field(default_factory=dict)
    """Facts to keep beside the durations."""


def cases(sizes: list[int], session_runs: int, *, peers_only: bool = False) -> list[Case]:
    """The cases of a round; cases that are compared are adjacent. Pure (no I/O).

    The sessions of ordinary tests are repeated `session_runs` times, since the plugin adds little
    to them. `peers_only` leaves only the cases that do not need our plugin.
    """
    switches = (WITHOUT, WITH)
    found = [
        Case(SPAWN, "all_reduce", TARGET_SIZE),
        *(
            Case(method, "all_reduce", size)
            for size in sizes
            for method in (FORK, FORK_TUNED, FRESH, WARM)
        ),
        *(
            Case(method, workload, TARGET_SIZE)
            for workload in ("dtensor", "fsdp2")
            for method in (FORK, FORK_TUNED, FRESH)
        ),
        *(Case(GIVEN, "examples", size) for size in (ONE_PROCESS, 1, TARGET_SIZE)),
        Case(REPAIR, "examples", TARGET_SIZE),
        *[Case(method, "short", SHORT_TESTS) for method in (WITHOUT, FRESH)] * session_runs,
        *[Case(method, "ordinary", ORDINARY_TESTS) for method in switches] * session_runs,
        *[Case(method, "ordinary", START_TESTS) for method in (*switches, IMPORT)] * session_runs,
    ]
    return [case for case in found if case.method in PEERS] if peers_only else found


def measure(case: Case, worlds: int, spawn_tests: int) -> Timing:
    """The timing of one run of the case, in fresh processes.

    `worlds` is how many worlds one run times, `spawn_tests` how many torch's slow harness runs.
    Raises SampleFailed when a process of the run failed or a test did not pass.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        scratch = Path(name)
        if case.method == SPAWN:
            return _measure_script(scratch, "peer_spawn.py", "--tests", str(spawn_tests))
        if case.method in (FORK, FORK_TUNED):
            return _measure_fork(scratch, case, worlds)
        if case.method == IMPORT:
            processes.run([sys.executable, "-c", IMPORT_SCRIPT], scratch)
            return _read_timing(scratch)
        if case.workload == "short":
            return _measure_short(scratch, case)
        if case.method in SWITCHES:
            return _measure_ordinary(scratch, case)
        if case.method in (GIVEN, REPAIR):
            return _measure_examples(scratch, case)
        return _measure_worlds(scratch, case, worlds)


def _measure_script(scratch: Path, script: str, *options: str) -> Timing:
    """Run a script of this folder; returns the contents of its `--out` file."""
    path = str(processes.BENCHMARKS / script)
    # As pytest_dcp sets for its own ranks: a peer must not lose time looking up its host name.
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OPENBLAS_NUM_THREADS": "1"}
    argv = [sys.executable, path, *options, "--out", "out.json"]
    processes.run(argv, scratch, settings=settings)
    return _read_timing(scratch)


def _measure_fork(scratch: Path, case: Case, worlds: int) -> Timing:
    """The timing of bare forked worlds: the first one and `worlds` others."""
    options = ["--workload", case.workload, "--size", str(case.size), "--worlds", str(worlds + 1)]
    if case.method == FORK_TUNED:
        options.append("--huge-pages")
    return _measure_script(scratch, "peer_fork.py", *options)


def _measure_worlds(scratch: Path, case: Case, worlds: int) -> Timing:
    """The timing of our worlds: the first one and `worlds` others."""
    tests = worlds + 2  # the first test and the last are not counted
    suite = suites.world_suite(case.workload, case.size, ISOLATIONS[case.method], tests)
    times, _ = _run_session(scratch, suite, tests, "pytest_dcp")
    return Timing(each_ms=times.each_ms(), first_ms=times.first_ms())


def _measure_examples(scratch: Path, case: Case) -> Timing:
    """The timing of one example of a property, which does nothing with what it draws."""
    write, examples = (
        (suites.example_suite, EXAMPLES) if case.method == GIVEN else (suites.repair_suite, REPAIRS)
    )
    suite = write(case.size, EXAMPLE_TESTS, examples)
    times, _ = _run_session(scratch, suite, EXAMPLE_TESTS, "pytest_dcp")
    return Timing(each_ms=[each_ms / examples for each_ms in times.each_ms()])


def _measure_ordinary(scratch: Path, case: Case) -> Timing:
    """The timing of one whole session of ordinary tests, from its start to its exit."""
    suite = suites.plain_suite(case.size)
    times, wall_ms = _run_session(scratch, suite, case.size, SWITCHES[case.method])
    return Timing(each_ms=[wall_ms], notes={"torch_imported": times.torch_imported})


def _measure_short(scratch: Path, case: Case) -> Timing:
    """The timing of one whole session of tests that use torch, in worlds or in one process."""
    is_in_worlds = case.method == FRESH
    suite = suites.short_suite(TARGET_SIZE if is_in_worlds else 0, case.size)
    _, wall_ms = _run_session(
        scratch, suite, case.size, SWITCHES[WITH if is_in_worlds else WITHOUT]
    )
    return Timing(each_ms=[wall_ms])


def _run_session(
    scratch: Path, suite: str, tests: int, switch: str
) -> tuple[suites.SessionTimes, float]:
    """The times that the session's conftest wrote, and the session's wall time in ms.

    Raises SampleFailed unless every test passed.
    """
    suites.write(scratch, suite)
    argv = [sys.executable, "-m", "pytest", "-p", switch, "-p", "no:cacheprovider", "-q"]
    wall_ms = processes.run(argv, scratch)
    times = suites.read_times(scratch)
    if times.passed != tests or len(times.starts_s) != tests:
        output = (scratch / "output.txt").read_text(errors="replace")
        raise processes.SampleFailed(f"{times.passed} of {tests} tests passed:\n{output}")
    return times, wall_ms


def _read_timing(scratch: Path) -> Timing:
    """The timing that a script wrote to `out.json`."""
    return Timing(**json.loads((scratch / "out.json").read_text()))
