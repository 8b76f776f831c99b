"""Times the checkpoint engine: ours, torch's and the raw system calls, alternating in one run.

    python tests/benchmarks/bench_engine.py [--rounds N] [--only NAME]... [--place disk|tmpfs]
        [--quick] [--full] [--profile] [--folder DIR] [--out DIR] [--markdown] [--list]
        [--ours-only] [--guide PAGE]

Each case forks a world of four gloo ranks on the CPU (one thread each), prepares its checkpoint,
runs every method once and compares the loaded or saved bits; then each round runs every method
once, in turn. A time is that of the slowest rank between two barriers; the memory that is loaded
into has been touched before. Figures are medians, and only ratios within one run mean anything.
Files are in the page cache, except in the cases called cold. A target that is missed is reported
and is no failure.

`--quick` takes a sixteenth of every state, and one round: it shows that everything runs, and its
ratios mean little. Planning at 1,024 ranks is timed for torch only with `--full`: it takes minutes.

The package `torch-checkpointing` is a peer where it is installed (extra `bench`); where it is not,
the report says so. Needs the extras `test` and `bench`.
"""

import argparse
import fnmatch
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import bench_worlds
import engine_async
import engine_cases
import engine_moves
import engine_peers
import engine_plans
import engine_table
import figures
import psutil  # type: ignore[import-untyped,unused-ignore] # without types-psutil
import table
from engine_cases import DISK, PLACES, TMPFS, Case
from engine_ranks import WorldFailed, run_world
from rich.console import Console

ROUNDS = 5
QUICK_ROUNDS = 1
FILE_NAME = "bench_engine.json"
WIDE_COLUMNS = 170
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")

Answer = dict[str, dict[str, Any]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the changes that `--quick` implies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, or {QUICK_ROUNDS} if quick")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="cases whose name is this, begins with it or matches it as a pattern; may be repeated",
    )
    parser.add_argument("--place", choices=PLACES, help="only the cases of this place")
    parser.add_argument("--quick", action="store_true", help="small states, one round")
    parser.add_argument("--full", action="store_true", help="torch's planning at 1,024 ranks too")
    parser.add_argument("--profile", action="store_true", help="write profiles of our methods")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a disk")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE_NAME}; default: a new one")
    parser.add_argument("--markdown", action="store_true", help="print GitHub markdown as well")
    parser.add_argument("--ours-only", action="store_true", help="leave the peers out")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    figures.add_option(parser)
    options = parser.parse_args(argv)
    if options.rounds is None:
        options.rounds = QUICK_ROUNDS if options.quick else ROUNDS
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds!r}")
    options.cases = chosen(options.only, options.place)
    if not options.cases:
        parser.error(f"no case is called {options.only!r} there; --list prints their names")
    return options


def chosen(only: Sequence[str] | None, place: str | None) -> list[Case]:
    """The cases that were asked for. Pure (no I/O)."""
    return [
        case
        for case in engine_cases.cases()
        if place in (None, case.place)
        and (
            only is None
            or any(case.name.startswith(name) or fnmatch.fnmatch(case.name, name) for name in only)
        )
    ]


def file_system(folder: Path) -> str:
    """The type of the file system that the folder lies on."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    real = folder.resolve()
    return next((mounts[str(p)] for p in (real, *real.parents) if str(p) in mounts), "unknown")


def places(folder: Path | None) -> dict[str, Path]:
    """A new folder in each place: on a disk, unless a folder is given, and in memory."""
    temporary = Path(tempfile.gettempdir())
    if folder is None:
        folder = Path.cwd() if file_system(temporary) in MEMORY_FILE_SYSTEMS else temporary
    folder.mkdir(parents=True, exist_ok=True)
    above = {DISK: folder, TMPFS: Path("/dev/shm")}
    return {
        name: Path(tempfile.mkdtemp(prefix="bench-engine-", dir=path))
        for name, path in above.items()
    }


def measure(case: Case, folder: Path, options: argparse.Namespace) -> Answer:
    """The answer of one case: times of every method and numbers beside them.

    Raises WorldFailed when a rank failed.
    """
    if options.ours_only:
        own_methods = tuple(method for method in case.methods if method in engine_cases.OUR_OWN)
        case = replace(case, methods=own_methods)
    rounds, quick, profile = options.rounds, options.quick, options.profile
    if case.kind.startswith("plan"):
        job = partial(
            engine_plans.run_plan,
            case, rounds=rounds, quick=quick, full=options.full, profile=profile,
        )  # fmt: skip
        return run_world(job, 1)  # type: ignore[no-any-return] # from JSON
    if case.kind == "index":
        index = partial(
            engine_plans.run_index,
            case, folder=folder, rounds=rounds, quick=quick, profile=profile,
        )  # fmt: skip
        return run_world(index, 1)  # type: ignore[no-any-return] # from JSON
    if "memory" in case.kind:
        found = {
            method: run_world(
                partial(engine_moves.extra_memory, case, folder=folder, method=method, quick=quick),
                case.ranks,
            )
            for method in case.methods
        }
        return {"ms": {}, "notes": engine_moves.memory_notes(found)}
    runs = engine_async.run if case.kind == "async" else engine_moves.run
    move = partial(runs, case, folder=folder, rounds=rounds, quick=quick, profile=profile)
    return run_world(move, case.ranks)  # type: ignore[no-any-return] # from JSON


def measure_all(
    options: argparse.Namespace, console: Console
) -> Iterator[tuple[Case, Answer | None]]:
    """Each case with its answer, as soon as it is measured; None for a case that failed."""
    roots = places(options.folder)
    try:
        for number, case in enumerate(options.cases):
            key = case.checkpoint
            folder = roots[case.place] / "-".join(key or ("case", str(number)))
            folder.mkdir(exist_ok=True)
            try:
                yield case, measure(case, folder, options)
                outcome = ""
            except WorldFailed as failure:
                yield case, None
                outcome = f": FAILED: {failure}"
            line = f"{number + 1}/{len(options.cases)}  {case.name}, {case.place}{outcome}"
            console.print(line, markup=False)
            later = [other.checkpoint for other in options.cases[number + 1 :]]
            if key is None or key not in later:
                shutil.rmtree(folder)
    finally:
        for root in roots.values():
            shutil.rmtree(root, ignore_errors=True)


def document(
    options: argparse.Namespace, where: dict[str, object], answers: Sequence[tuple[Case, Answer]]
) -> dict[str, object]:
    """The JSON document of a run. Pure (no I/O)."""
    option_names = ("rounds", "quick", "full", "ours_only", "only", "place")
    return {
        "environment": where,
        "options": {name: getattr(options, name) for name in option_names},
        "absent peers": engine_peers.absent(),
        "cases": [
            {
                "case": asdict(case),
                "ms": answer["ms"],
                "spread": {
                    name: asdict(engine_table.spread(times))
                    for name, times in answer["ms"].items()
                    if times
                },
                "notes": answer["notes"],
                "verdicts": [
                    {
                        "goal": asdict(verdict.goal),
                        "measured": verdict.measured,
                        "met": verdict.met,
                    }
                    for verdict in engine_table.judged(case, answer)
                ],
            }
            for case, answer in answers
        ],
    }


def write_profiles(folder: Path, answers: Sequence[tuple[Case, Answer]]) -> None:
    """A file for each profile; the answers keep its name only."""
    for case, answer in answers:
        text = answer["notes"].pop("profile", None)
        if text is not None:
            name = f"profile {case.name} {case.place}.txt".replace(" ", "-")
            (folder / name).write_text(text)
            answer["notes"]["profile of rank 0"] = name


def report(answers: Sequence[tuple[Case, Answer]], console: Console, *, markdown: bool) -> None:
    """Prints the table."""
    rows = [
        engine_table.row(verdict)
        for case, answer in answers
        for verdict in engine_table.judged(case, answer)
    ]
    table.show(console, "medians in ms", engine_table.COLUMNS, rows)
    if markdown:
        print(f"\n{table.markdown(engine_table.COLUMNS, rows)}")
    for name in engine_peers.absent():
        print(f"{name} is not installed: not compared")


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Leaves by an exception, so that the ranks are ended and the folders removed."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when a case failed to run: the others are reported all the same."""
    options = parse(argv)
    if options.list:
        print("\n".join(f"{case.name}  ({case.place})" for case in options.cases))
        return 0
    signal.signal(signal.SIGTERM, _leave)
    progress = Console(stderr=True, highlight=False)
    where = bench_worlds.environment()
    where["file systems"] = {
        DISK: file_system(options.folder or Path(tempfile.gettempdir())),
        TMPFS: file_system(Path("/dev/shm")),
    }
    found = list(measure_all(options, progress))
    answers = [(case, answer) for case, answer in found if answer is not None]
    folder = options.out or Path(tempfile.mkdtemp(prefix="bench-engine-out-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_profiles(folder, answers)
    path = folder / FILE_NAME
    run = document(options, where, answers)
    path.write_text(json.dumps(run, indent=1) + os.linesep)
    # Where there is no terminal to fit, the table takes the room that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=WIDE_COLUMNS)
    report(answers, console, markdown=options.markdown)
    print(f"\nraw samples: {path}")
    if options.guide:
        figures.update(options.guide, run)
    failed = [f"{case.name} ({case.place})" for case, answer in found if answer is None]
    if failed:
        print(f"FAILED to run: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
