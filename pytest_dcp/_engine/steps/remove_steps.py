"""Removing steps of a run at a caller's wish."""

from __future__ import annotations

from pytest_dcp._engine.steps.open_run import OpenRun


def remove_later_steps(run: OpenRun, step: int) -> list[int]:
    """Remove the steps after this one; returns their numbers. Collective.

    Raises ValueError if this step is not whole.
    """

    def remove() -> list[int]:
        steps = run.steps
        found = steps.look_at(step, None)
        if not found.is_whole:
            raise ValueError(f"step {step} in {run} is not whole: {found.problem}")
        later = [number for number in steps.folders.numbers() if number > step]
        run.take_lock()
        for number in reversed(later):
            steps.remove(number)
        return later

    removed = run.ask_coordinator("remove later steps", remove)
    for number in removed:
        run.steps.forget(number)
    return removed
