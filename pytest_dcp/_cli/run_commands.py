"""The commands about the steps of a run: `latest`, `steps`, `prune`, `gc`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console

from pytest_dcp._cli.arguments import Json, StorageOptions, parse_storage_options, print_json
from pytest_dcp._cli.exit_codes import FOUND, NO_STEP, report_refusals
from pytest_dcp._cli.texts import draw_table, plain_text, show_bytes
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.clean_run import find_leftovers, remove_leftovers
from pytest_dcp._engine.steps.inspect_step import CheckLevel, ListLevel
from pytest_dcp._engine.steps.known_steps import KnownSteps, Step
from pytest_dcp._engine.steps.retention import BestSteps, RetentionPolicy
from pytest_dcp._engine.steps.run_lock import RunLock
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.step_names import step_name

Run = Annotated[str, typer.Argument(help="The folder, or URL, with the folders of the steps.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show it, and change nothing.")]
Idle = Annotated[
    bool,
    typer.Option(
        "--idle",
        help="No job saves in the run: you know it. Needed where no lock says so: at URLs.",
    ),
]


PIPE_WIDTH = 10_000


class Check(str, Enum):
    """How closely a step is looked at."""

    names = "names"
    sizes = "sizes"
    checksums = "checksums"


class WholeCheck(str, Enum):
    """The test that a whole step passes."""

    sizes = "sizes"
    checksums = "checksums"


Level = Annotated[WholeCheck, typer.Option("--check", help="The test that a whole step passes.")]


def print_latest(
    run: Run,
    check: Level = WholeCheck.sizes,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Print the newest whole step; the exit code is 1 if there is none."""
    with report_refusals():
        steps = _open_steps(run, check.value, storage_option)
        found, problems = steps.find_latest()
        if as_json:
            described = None if found is None else _describe(steps, found)
            print_json({"run": run, "latest": described, "passed_over": problems})
        else:
            for number, problem in problems.items():
                print(f"{step_name(number)}: passed over: {plain_text(problem)}")
            print("no step" if found is None else plain_text(_folder(steps, found)))
    if found is None:
        raise typer.Exit(NO_STEP)


def list_steps(
    run: Run,
    check: Annotated[Check, typer.Option(help="How closely each step is looked at.")] = Check.sizes,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """List the steps of a run; the exit code is 1 if one is not whole."""
    with report_refusals():
        run_steps = _open_steps(run, "sizes", storage_option)
        level: ListLevel = check.value
        found = run_steps.list_steps(level)
        if as_json:
            print_json({"run": run, "steps": [_describe(run_steps, step) for step in found]})
        else:
            table = draw_table(("step", "saved", "metrics", "state"), list(map(_row, found)), 0)
            # One line for each step, for other programs.
            Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
    if not all(step.is_whole for step in found):
        raise typer.Exit(FOUND)


def prune_run(
    run: Run,
    keep_last: Annotated[int, typer.Option(help="How many of the newest to keep.", min=1)],
    keep_every: Annotated[
        int | None, typer.Option(help="Keep steps whose number is divisible by it.", min=1)
    ] = None,
    best: Annotated[
        str | None, typer.Option(help="METRIC:min:COUNT or METRIC:max:COUNT: keep the best, too.")
    ] = None,
    check: Level = WholeCheck.sizes,
    dry_run: DryRun = False,
    idle: Idle = False,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Remove the whole steps that no rule keeps. The newest whole step always stays."""
    with report_refusals():
        policy = RetentionPolicy(keep_last, keep_every, None if best is None else _parse_best(best))
        run_steps = _open_steps(run, check.value, storage_option, policy)
        if dry_run:
            removed = run_steps.steps_to_remove(keep_last)
        else:
            with _hold_lock(run_steps, run, idle=idle):
                removed = run_steps.remove_old(keep_last)
        if as_json:
            print_json({"run": run, "removed": removed, "dry_run": dry_run})
        else:
            for number in removed:
                print(step_name(number))
            print(f"{len(removed)} steps {_verb(dry_run=dry_run)}")


def clean_run(
    run: Run,
    quarantined: Annotated[
        bool, typer.Option("--quarantined", help="Also the folders in not-whole.")
    ] = False,
    dry_run: DryRun = False,
    idle: Idle = False,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Remove what crashed saves and removals have left, never a checkpoint with an index."""
    with report_refusals():
        run_steps = _open_steps(run, "sizes", storage_option)
        if dry_run:
            found = find_leftovers(run_steps, quarantined=quarantined)
        else:
            with _hold_lock(run_steps, run, idle=idle):
                found = remove_leftovers(run_steps, quarantined=quarantined)
        nbytes = sum(leftover.nbytes for leftover in found)
        if as_json:
            rows = [asdict(leftover) for leftover in found]
            print_json({"run": run, "removed": rows, "nbytes": nbytes, "dry_run": dry_run})
        else:
            for leftover in found:
                name = plain_text(leftover.name)
                print(f"{name}: {leftover.kind}, {show_bytes(leftover.nbytes)}")
            print(f"{len(found)} leftovers, {show_bytes(nbytes)}, {_verb(dry_run=dry_run)}")


def _open_steps(
    run: str,
    check: CheckLevel,
    storage_option: list[str] | None,
    policy: RetentionPolicy | None = None,
) -> KnownSteps:
    """Raises FileNotFoundError for a local folder that does not exist: it may be a slip."""
    place = RunPlace(run, parse_storage_options(storage_option))
    run_steps = KnownSteps(place, policy or RetentionPolicy(), check)
    root = run_steps.folders.root
    if isinstance(root.disk, LocalDisk) and not root.path.is_dir():
        raise FileNotFoundError(f"{run} is no folder")
    return run_steps


@contextmanager
def _hold_lock(run_steps: KnownSteps, run: str, *, idle: bool) -> Iterator[None]:
    """Keep jobs from saving meanwhile. Raises CheckpointError if one does."""
    lock = RunLock()
    if not lock.take(run_steps.folders) and not idle:
        raise ValueError(f"{run} has no lock: pass --idle if you know that no job saves in it")
    try:
        yield
    finally:
        lock.release()


def _parse_best(text: str) -> BestSteps:
    metric, _, rest = text.partition(":")
    direction, _, count = rest.partition(":")
    if direction not in ("min", "max") or not count.isdecimal() or not metric:
        raise ValueError(f"--best takes METRIC:min:COUNT or METRIC:max:COUNT, got {text!r}")
    return BestSteps(metric, "min" if direction == "min" else "max", int(count))


def _describe(run_steps: KnownSteps, step: Step) -> dict[str, Any]:
    saved_at = None if step.saved_at is None else step.saved_at.isoformat()
    return asdict(step) | {
        "folder": _folder(run_steps, step),
        "saved_at": saved_at,
        "is_whole": step.is_whole,
    }


def _folder(run_steps: KnownSteps, step: Step) -> str:
    return str(run_steps.folders.checkpoint_id(step.number))


def _row(step: Step) -> tuple[str, str, str, str]:
    saved_at = "" if step.saved_at is None else f"{step.saved_at:%Y-%m-%d %H:%M:%S}"
    metrics = ", ".join(f"{name} {value:g}" for name, value in step.metrics.items())
    state = f"whole, by {step.checked}" if step.problem is None else step.problem
    return step_name(step.number), saved_at, metrics, state


def _verb(*, dry_run: bool) -> str:
    return "would be removed" if dry_run else "removed"
