"""Training continues from a checkpoint as if it had never stopped, in any layout."""

from __future__ import annotations

from typing import Any, Protocol

import torch

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.properties.differences import differences
from pytest_dcp.properties.laws.engine import Engine, expected_warnings
from pytest_dcp.properties.laws.steps import Folder, enter, load_into, save_state
from pytest_dcp.properties.meshes import MeshSpec
from pytest_dcp.properties.subworlds import Stages, on_first_ranks, rank
from pytest_dcp.properties.whole import whole

TOLERANCE = 1e-9
"""Relative and absolute, for float64: another layout adds numbers in another order."""


class Run(Protocol):
    """This rank's part of a training run. Each method is collective."""

    def train(self, first: int, last: int) -> None:
        """Take the steps first to last - 1, whose batches are the same in every run."""

    def state(self) -> dict[str, Any]:
        """The state dict of everything that a checkpoint must hold."""

    def take(self, state: dict[str, Any]) -> None:
        """Continue from this state."""


class Trainable(Protocol):
    """Description of something trainable."""

    @property
    def world_size(self) -> int: ...

    @property
    def meshes(self) -> tuple[MeshSpec, ...]: ...

    def start(self, *, fresh: bool) -> Run:
        """A run at its first step; with `fresh`, its parameters differ from the usual
        initial ones.
        """


def assert_training_resumes(
    saved: Trainable,
    loaded: Trainable,
    folder: Folder,
    *,
    steps: int = 2,
    exact: bool | None = None,
    dcp: Engine = checkpoint,
) -> None:
    """Check that n steps, save, load into a fresh run and n more steps equal 2n steps in one go.

    The loaded state must equal the saved one to the bit. With `exact`, the default if both layouts
    are equal, so must the final states; otherwise they must be close (1e-9, so train in float64).
    Collective, like `assert_round_trip`.
    """
    __tracebackhide__ = True
    exact = saved == loaded if exact is None else exact
    enter(saved, loaded)
    seen: list[dict[str, Any]] = []

    def straight() -> Stages:
        return _train_straight_on(saved, folder, steps, dcp, seen)

    def resumed() -> Stages:
        return _resume_training(loaded, folder, steps, dcp, seen, exact=exact)

    with expected_warnings():
        on_first_ranks(saved.world_size, "training and saving", straight)
        on_first_ranks(loaded.world_size, "loading and training on", resumed)


def _train_straight_on(
    saved: Trainable, folder: Folder, steps: int, dcp: Engine, seen: list[dict[str, Any]]
) -> Stages:
    """Train for 2 * steps and save in the middle; `seen` gets the states there and at the end."""
    run = saved.start(fresh=False)
    yield
    run.train(0, steps)
    state = run.state()
    yield
    seen.append(whole(state, saved.world_size))
    save_state(dcp, saved, state, folder)
    yield
    run.train(steps, 2 * steps)
    state = run.state()
    yield
    seen.append(whole(state, saved.world_size))
    return ()


def _resume_training(
    loaded: Trainable,
    folder: Folder,
    steps: int,
    dcp: Engine,
    seen: list[dict[str, Any]],
    *,
    exact: bool,
) -> Stages:
    """Load into a fresh run and train on; returns the differences from the states in `seen`."""
    run = loaded.start(fresh=True)
    state = run.state()
    yield
    load_into(dcp, loaded, folder, state)
    yield
    run.take(state)
    state = run.state()
    yield
    middle = whole(state, loaded.world_size)
    run.train(steps, 2 * steps)
    state = run.state()
    yield
    end = whole(state, loaded.world_size)
    if rank():
        return []
    found = differences(middle, seen[0])
    return found or (differences if exact else _beyond_tolerance)(end, seen[1])


def _beyond_tolerance(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Differences beyond the tolerance, between two states with the same names."""
    problems = []
    for fqn, expected_value in expected.items():
        actual_value = actual[fqn]
        if not isinstance(expected_value, torch.Tensor):
            continue
        try:
            torch.testing.assert_close(
                actual_value, expected_value, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
            )
        except AssertionError as error:
            problems.append(f"{fqn}: after training on: {error}")
    return problems
