"""The command `bisect`: the first step of a run at which a condition holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pytest_dcp._cli.arguments import Json, StorageOptions, parse_storage_options, print_json
from pytest_dcp._cli.exit_codes import NO_STEP, report_refusals
from pytest_dcp._cli.progress import show_progress
from pytest_dcp._cli.texts import plain_text
from pytest_dcp._engine.steps.first_step import FirstStep, find_first_step
from pytest_dcp._engine.steps.numbered_folders import find_numbered_folders
from pytest_dcp._engine.steps.tensor_conditions import TensorCondition

SHOWN = 20
"""Tensors in a terminal."""


def bisect(
    run: Annotated[str, typer.Argument(help="The folder, or URL, with the folders of the steps.")],
    name: Annotated[str, typer.Option("--name", help="The name of a tensor, or a pattern.")],
    test: Annotated[str, typer.Option("--test", help="nan, frozen, or norm>NUMBER (in quotes).")],
    folders: Annotated[
        str | None, typer.Option("--folders", help="A pattern of the folders of the steps.")
    ] = None,
    monotone: Annotated[
        bool,
        typer.Option(
            "--monotone",
            help="Search by halves: right only if the test, once it holds, holds in every later "
            "step.",
        ),
    ] = False,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Find the first step at which a tensor has NaN, is frozen, or has a large norm.

    The exit code is 1 if there is none.
    """
    with report_refusals():
        condition = TensorCondition.parse(test)
        steps = find_numbered_folders(run, folders, parse_storage_options(storage_option))
        with show_progress("examining", len(steps), quiet=as_json) as report:
            found = find_first_step(steps, name, condition, monotone=monotone, report=report)
        if as_json:
            print_json(asdict(found) | {"run": run, "name": name, "test": test})
        else:
            _print_step(found, test)
    if found.step is None:
        raise typer.Exit(NO_STEP)


def _print_step(found: FirstStep, test: str) -> None:
    for folder, reason in found.skipped:
        print(f"{plain_text(folder)}: skipped: {plain_text(reason)}")
    sums = f"{found.examined} of {found.step_count} steps examined"
    if found.step is None:
        print(f"no step: {plain_text(test)} holds at none; {sums}")
        return
    for one in found.evidence[:SHOWN]:
        print(f"{plain_text(found.step)}: {plain_text(one.name)}: {one.text}")
    if len(found.evidence) > SHOWN:
        print(f"{plain_text(found.step)}: {len(found.evidence) - SHOWN} more tensors")
    before = "" if found.before is None else f"; the step before is {plain_text(found.before)}"
    print(f"{sums}{before}")
