"""Saving one step of a run: its preparation, the save, and the removals after it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from pytest_dcp._engine.background.async_save import async_save
from pytest_dcp._engine.steps.increments import IncrementPlan, require_no_writer
from pytest_dcp._engine.steps.open_run import OpenRun
from pytest_dcp._engine.steps.retention import BestSteps, require_count
from pytest_dcp._engine.steps.running_save import RunningSave
from pytest_dcp._engine.steps.small_files import MOST_NOTES_BYTES
from pytest_dcp._engine.steps.step_folders import StepNotes
from pytest_dcp._engine.steps.step_names import LAST_STEP
from pytest_dcp._engine.verbs.save import save
from pytest_dcp.errors import CheckpointError, SaveAbandonedError
from pytest_dcp.tracebacks import warn_caller

MOST_METRICS_BYTES = MOST_NOTES_BYTES - 1000
"""The time is in the notes, too; longer ones would not be read."""


def save_step(
    run: OpenRun,
    step: int,
    state_dict: dict[str, Any],
    metrics: Mapping[str, float] | None,
    keywords: Mapping[str, Any],
) -> None:
    """Save a step, then remove the steps that no rule keeps. Collective."""
    target = _begin(run, step, metrics, keywords)
    saving = _follow_progress(run, step, target)
    run.running_save = saving
    try:
        with run.ranks.without_warning():
            save(state_dict, **target)
    finally:
        run.running_save = None
    _end(run, step)


def start_save(
    run: OpenRun,
    step: int,
    state_dict: dict[str, Any],
    metrics: Mapping[str, float] | None,
    keywords: Mapping[str, Any],
) -> Future[Metadata] | AsyncSaveResponse:
    """Save a step in the background; `wait_for_save` waits for it. Collective."""
    target = _begin(run, step, metrics, keywords)
    saving = _follow_progress(run, step, target)
    with run.ranks.without_warning():
        response = async_save(state_dict, **target)
    if isinstance(response, AsyncSaveResponse):
        saving.follow(response.upload_completion)
    else:
        saving.follow(response)
    run.running_save = saving
    return response


def wait_for_save(run: OpenRun) -> None:
    """Return when no save runs any more; raises the error of one that failed. Collective."""
    saving, run.running_save = run.running_save, None
    if saving is not None:
        try:
            saving.wait()
        except SaveAbandonedError:
            if saving.is_running:
                run.keep_lock_during(saving)
            raise
        _end(run, saving.step)


def _follow_progress(run: OpenRun, step: int, target: dict[str, Any]) -> RunningSave:
    """Follow the save of these arguments, whose own progress is called, too."""
    target["progress"] = saving = RunningSave(step, run.stop, target.get("progress"))
    return saving


def _begin(
    run: OpenRun,
    step: int,
    metrics: Mapping[str, float] | None,
    keywords: Mapping[str, Any],
) -> dict[str, Any]:
    """Prepare the step's folder; returns the arguments of `save`."""
    increments = run.increments
    numbers: dict[str, float] = {}

    def check() -> None:
        best = run.policy.best if run.ranks.has_coordinator else None
        numbers.update(_checked_metrics(metrics, best))
        _check_arguments(step, keywords, is_incremental=increments is not None)

    def begin() -> IncrementPlan | None:
        steps = run.steps
        run.take_lock()
        steps.require_after_newest(step)
        plan = None if increments is None else increments.begin(steps, step)
        steps.move_aside(step)
        steps.folders.note_start(step, numbers)
        return plan

    plan = run.ask_coordinator(f"begin step {step}", begin, check)
    run.steps.forget(step)
    target = run.arguments_for(step, keywords)
    if increments is not None and plan is not None:
        target.pop("storage_options", None)  # the writer has them
        target["storage_writer"] = increments.writer(run.steps, step, plan)
    return target


def _end(run: OpenRun, step: int) -> None:
    """The coordinator's alone: a failure is a warning, since the step is saved."""
    if not run.ranks.has_coordinator:
        return
    try:
        run.steps.folders.note_end(step)
        if run.increments is not None:
            run.increments.end(run.steps, step)
    except (OSError, CheckpointError) as error:
        warn_caller(f"step {step} is saved, but {run} is not noted so: {error}")
    if run.policy.keep_last is None:
        return
    try:
        run.steps.remove_old(run.policy.keep_last)
    except (OSError, CheckpointError) as error:
        warn_caller(f"old steps in {run} were not removed: {error}")


def _check_arguments(step: int, keywords: Mapping[str, Any], *, is_incremental: bool) -> None:
    require_count("step", step, least=0)
    if step > LAST_STEP:
        raise ValueError(f"step takes a number up to {LAST_STEP}, got {step}")
    if not keywords.get("use_collectives", True):
        raise ValueError(
            "use_collectives=False cannot be given: a step has one index, which rank 0 writes"
        )
    if is_incremental:
        require_no_writer(keywords)


def _checked_metrics(
    metrics: Mapping[str, float] | None, best: BestSteps | None
) -> dict[str, float]:
    """The metrics as floats. best: the rule that needs one of them."""
    numbers: dict[str, float] = {}
    if not isinstance(metrics, Mapping | None):
        raise TypeError(f"metrics= takes names with their numbers, got {metrics!r:.200}")
    for name, value in (metrics or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor's
            raise TypeError(f"metrics= takes numbers, got {name}={value!r:.200}") from None
        if math.isnan(numbers[str(name)]):
            warn_caller(f"metric {name!r} is NaN: no best step is chosen by it")
    if len(StepNotes(numbers).to_bytes()) > MOST_METRICS_BYTES:
        raise ValueError(
            f"metrics= takes at most {MOST_METRICS_BYTES:,} bytes of JSON: these {len(numbers)} "
            "are longer"
        )
    if numbers and best is not None and best.metric not in numbers:
        warn_caller(
            f"metric {best.metric!r} is missing: best= chooses none of the steps saved without it"
        )
    return numbers
