"""Training goes on from a checkpoint as if it had never stopped, in any layout."""

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
"""Relative and absolute, of float64: another layout adds in another order."""


class Run(Protocol):
    """A training that goes on: this rank's part of it. Each method is collective."""

    def train(self, first: int, last: int) -> None:
        """Take the steps first to last - 1, whose batches are the same in every run."""

    def state(self) -> dict[str, Any]:
        """The state dict of all that a checkpoint must hold."""

    def take(self, state: dict[str, Any]) -> None:
        """Go on from this state."""


class Trainable(Protocol):
    """What can be trained, described."""

    @property
    def world_size(self) -> int: ...

    @property
    def meshes(self) -> tuple[MeshSpec, ...]: ...

    def start(self, *, fresh: bool) -> Run:
        """A run at its first step; with `fresh` other parameters than it begins with otherwise."""


def assert_training_resumes(
    saved: Trainable,
    loaded: Trainable,
    folder: Folder,
    *,
    steps: int = 2,
    exact: bool | None = None,
    dcp: Engine = checkpoint,
) -> None:
    """Some steps, save, load into a fresh run elsewhere, as many steps = all steps in one go.

    What is loaded must equal what was saved to the bit. So must the end with `exact`, by default
    where both are equal; otherwise it must be near (1e-9, so train in float64). Collective, as
    `assert_round_trip`.
    """
    __tracebackhide__ = True
    exact = saved == loaded if exact is None else exact
    enter(saved, loaded)
    seen: list[dict[str, Any]] = []

    def straight() -> Stages:
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

    def resumed() -> Stages:
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
        return found or (differences if exact else _far)(end, seen[1])

    with expected_warnings():
        on_first_ranks(saved.world_size, "training and saving", straight)
        on_first_ranks(loaded.world_size, "loading and training on", resumed)


def _far(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not near, of two states that have the same names."""
    problems = []
    for fqn, wanted in expected.items():
        got = actual[fqn]
        if not isinstance(wanted, torch.Tensor):
            continue
        try:
            torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        except AssertionError as error:
            problems.append(f"{fqn}: after training on: {error}")
    return problems
