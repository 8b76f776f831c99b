"""Times worlds of ranks: ours, torch's own harness, and bare forks, alternating in one run.

    python tests/benchmarks/bench_worlds.py [--rounds N] [--sizes 1,2,4,8] [--out DIR] [--quick]
        [--markdown] [--peers-only] [--guide PAGE]

Every round runs every method once, in the same order, each in processes of its own. A figure is the
median over the rounds of each run's median; only ratios within one run mean anything. A target that
is missed is reported and is no failure; a sample that does not run is one, and the exit code is 1.

Needs the extras `test` and `bench`, and `expecttest` for torch's own harness.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

import figures
import methods
import processes
import table
from rich.console import Console

ROUNDS = 5
QUICK_ROUNDS = 1
FILE_NAME = "bench_worlds.json"
WORLDS = 12
SPAWN_TESTS = 2
SESSION_RUNS = 5
WIDE_COLUMNS = 150
QUICK = {"worlds": 4, "spawn_tests": 1, "session_runs": 2}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the changes that `--quick` implies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, or {QUICK_ROUNDS} if quick")
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default=[1, 2, 4, 8],
        help=f"numbers of ranks, comma-separated; {methods.TARGET_SIZE} is always among them",
    )
    parser.add_argument("--out", type=Path, help=f"folder for {FILE_NAME}; default: a new one")
    parser.add_argument("--quick", action="store_true", help="short rounds, and one of them")
    parser.add_argument("--markdown", action="store_true", help="print GitHub markdown as well")
    parser.add_argument("--peers-only", action="store_true", help="leave pytest_dcp out")
    figures.add_option(parser)
    parser.set_defaults(worlds=WORLDS, spawn_tests=SPAWN_TESTS, session_runs=SESSION_RUNS)
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds!r}")
    return options


def _sizes(text: str) -> list[int]:
    """The sizes in ascending order, the targets' size among them."""
    sizes = {int(part) for part in text.split(",")}
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a world has at least one rank, got {text!r}")
    return sorted(sizes | {methods.TARGET_SIZE})


def measure_rounds(options: argparse.Namespace, console: Console) -> Iterator[table.Sample]:
    """The samples of all rounds, each as soon as it is measured."""
    cases = methods.cases(options.sizes, options.session_runs, peers_only=options.peers_only)
    if not options.peers_only:
        for method, workload in ((methods.WITH, "ordinary"), (methods.FRESH, "all_reduce")):
            # Once, untimed: it leaves the plugin's compiled files behind.
            methods.measure(methods.Case(method, workload, 1), worlds=1, spawn_tests=1)
    for number in range(options.rounds):
        for case in cases:
            timing = methods.measure(case, options.worlds, options.spawn_tests)
            sample = table.Sample(number, case, timing)
            median = table.medians([sample])[case]
            console.print(
                f"round {number + 1}/{options.rounds}  {case.method}, {case.workload}, "
                f"{case.size}: {median.ms:,.1f} ms",
                highlight=False,
            )
            yield sample


def environment() -> dict[str, object]:
    """The machine and versions that the figures were measured on."""
    packages = ("torch", "pytest", "numpy")
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def document(
    options: argparse.Namespace,
    where: dict[str, object],
    samples: Sequence[table.Sample],
) -> dict[str, object]:
    """The JSON document of a run. Pure (no I/O)."""
    found = table.medians(samples)
    return {
        "environment": where,
        "options": {
            name: value for name, value in vars(options).items() if name not in ("out", "guide")
        },
        "samples": [asdict(sample) for sample in samples],
        "medians": [asdict(case) | asdict(median) for case, median in found.items()],
        "targets": [asdict(target) for target in table.targets(found, samples)],
    }


def report(samples: Sequence[table.Sample], console: Console, *, markdown: bool) -> None:
    """Prints the tables and the targets."""
    found = table.medians(samples)
    judged = table.targets(found, samples)
    parts = [
        (
            "ms per test or world: median, half the range of the runs",
            table.WORLD_COLUMNS,
            table.world_rows(found),
        ),
        ("ms per example of a property", table.EXAMPLE_COLUMNS, table.example_rows(found)),
        ("ms per session of ordinary tests", table.PLAIN_COLUMNS, table.plain_rows(found)),
        ("ms per short session", table.SHORT_COLUMNS, table.short_rows(found)),
        ("targets", table.TARGET_COLUMNS, table.target_rows(judged)),
    ]
    for title, columns, rows in parts:
        table.show(console, title, columns, rows)
    if markdown:
        for _, columns, rows in parts:
            print(f"\n{table.markdown(columns, rows)}")


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Leaves by an exception, so that the process that is being timed is ended too."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when a sample failed to run: then nothing is reported but the failure."""
    options = parse(argv)
    progress = Console(stderr=True)
    where = environment()
    processes.become_subreaper()
    signal.signal(signal.SIGTERM, _leave)
    try:
        samples = list(measure_rounds(options, progress))
    except processes.SampleFailed as failure:
        progress.print(f"a sample failed to run:\n{failure}", markup=False, highlight=False)
        return 1
    folder = options.out or Path(tempfile.mkdtemp(prefix="bench-worlds-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    run = document(options, where, samples)
    path.write_text(json.dumps(run, indent=1) + "\n")
    # Where there is no terminal to fit, the tables take the room that they need.
    console = Console() if sys.stdout.isatty() else Console(width=WIDE_COLUMNS)
    report(samples, console, markdown=options.markdown)
    print(f"\nraw samples: {path}")
    if options.guide:
        figures.update(options.guide, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
