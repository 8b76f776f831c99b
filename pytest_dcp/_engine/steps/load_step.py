"""Loading the newest whole step of a run, past steps that are damaged or vanish meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.steps.known_steps import Step
from pytest_dcp._engine.steps.open_run import OpenRun
from pytest_dcp._engine.verbs.load import load
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError
from pytest_dcp.tracebacks import warn_caller


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """The step that `load_latest` has loaded."""

    number: int
    metrics: Mapping[str, float]
    report: LoadReport


def load_latest_step(
    run: OpenRun, state_dict: dict[str, Any], keywords: Mapping[str, Any]
) -> LoadedStep | None:
    """Load the newest whole step, with the result and errors of `load_latest`. Collective."""
    while True:
        step = choose_latest(run)
        if step is None:
            _require_none_lost(run)
            return None
        try:
            with run.ranks.without_warning():
                report = load(state_dict, **run.arguments_for(step.number, keywords))
        except (OSError, CheckpointError) as error:
            if _has_index(run, step.number):
                if not isinstance(error, CheckpointCorruptError):
                    raise
                # The next look passes it over, and warns.
                run.steps.note_damage(step.number, str(error))
            continue
        return LoadedStep(step.number, step.metrics, report)


def choose_latest(run: OpenRun) -> Step | None:
    """The newest whole step, as the coordinator sees it; it warns of others, once. Collective."""
    step, problems = run.ask_coordinator(
        "look for the newest step", lambda: run.steps.find_latest()
    )
    if run.ranks.has_coordinator:
        for number, problem in problems.items():
            if run.steps.is_news(number, problem):
                warn_caller(f"step {number} in {run} is not whole and is passed over: {problem}")
    return step


def _has_index(run: OpenRun, number: int) -> bool:
    """Whether the step is still there, as the coordinator sees it."""
    return run.ask_coordinator("look again", lambda: run.steps.has_index(number))


def _require_none_lost(run: OpenRun) -> None:
    lost = run.ask_coordinator("list the steps", lambda: run.steps.list_steps(None))
    if lost:
        problems = "; ".join(f"step {step.number}: {step.problem}" for step in lost)
        raise CheckpointCorruptError(
            f"{run} has steps, and none of them is whole ({problems}); to begin "
            "anew, move the folder away"
        )
