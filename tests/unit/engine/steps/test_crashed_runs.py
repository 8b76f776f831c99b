"""After a crash at any instant a run has its newest whole step: every state of the folder is tried.

About 1,700 states of six operations under four models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_dcp.checkpoint import CheckpointCorruptError, CheckpointManager
from pytest_dcp.faults import CrashState, recorded

BUDGET = 100_000
"""More than there are of any operation: none is left out."""
MODELS = ("kill", "posix", "ext4-ordered", "nfs")


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((300,), float(step)), "b": torch.full((3,), -float(step)), "step": step}


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(300), "b": torch.zeros(3), "step": -1}


def manager_of(root: Path, **keywords: Any) -> CheckpointManager:
    return CheckpointManager(root, no_dist=True, **keywords)


def save_steps(*steps: int, keep_last: int | None = None) -> Callable[[Path], None]:
    def save(root: Path) -> None:
        with manager_of(root, keep_last=keep_last) as manager:
            for step in steps:
                manager.save(step, state_of(step), metrics={"loss": 1.0})

    return save


def save_in_background(root: Path) -> None:
    with manager_of(root, keep_last=1) as manager:
        manager.async_save(3, state_of(3))


def hide_the_last_index(root: Path) -> None:
    """Step 2 is not whole, so that a save of step 2 moves it aside."""
    save_steps(1, 2)(root)
    (root / "step-00000002" / ".metadata").unlink()


def go_back(root: Path) -> None:
    with manager_of(root) as manager:
        manager.remove_after(1)


@dataclass(frozen=True)
class Case:
    """An operation, and the steps that a load may find after a crash in it, and after its end."""

    prepare: Callable[[Path], None]
    operate: Callable[[Path], None]
    during: frozenset[int | None]
    after: frozenset[int | None]


CASES = {
    "first save": Case(lambda root: None, save_steps(1), frozenset({None, 1}), frozenset({1})),
    "save": Case(save_steps(1, 2), save_steps(3), frozenset({2, 3}), frozenset({3})),
    "save that removes two": Case(
        save_steps(1, 2), save_steps(3, keep_last=1), frozenset({2, 3}), frozenset({3})
    ),
    "background save": Case(
        save_steps(1, 2), save_in_background, frozenset({2, 3}), frozenset({3})
    ),
    "save over a step that is not whole": Case(
        hide_the_last_index, save_steps(2), frozenset({1, 2}), frozenset({2})
    ),
    "removal of later steps": Case(
        save_steps(1, 2, 3), go_back, frozenset({1, 2, 3}), frozenset({1})
    ),
}


@cache
def states_of(case: str, model: Any) -> list[CrashState]:
    chosen = CASES[case]
    return recorded(chosen.operate, chosen.prepare).crash_states(model, budget=BUDGET)


def find_step(root: Path) -> int | None:
    """The step that a run goes on from; its values are looked at."""
    state = blank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = manager_of(root).load_latest(state)
    if loaded is None:
        return None
    for name, expected in state_of(loaded.number).items():
        actual = state[name]
        same = torch.equal(actual, expected) if name != "step" else actual == expected
        assert same, f"{name} of step {loaded.number} is {actual}"
    return loaded.number


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_its_newest_whole_step(case: str, model: str) -> None:
    for state in states_of(case, model):
        allowed = CASES[case].after if state.returned else CASES[case].during
        with state.restored() as root:
            if None in allowed:  # the first save: there may be a step, and it is not whole
                with suppress(CheckpointCorruptError):
                    assert find_step(root) in allowed, repr(state)
            else:
                assert find_step(root) in allowed, repr(state)


@pytest.mark.parametrize("case", ["save", "save that removes two"])
def test_a_run_saves_on_after_a_crash(case: str) -> None:
    for state in states_of(case, "posix")[::6]:
        with state.restored() as root, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_steps(4, 5, keep_last=1)(root)
            with manager_of(root) as manager:
                whole = [step.number for step in manager.steps() if step.is_whole]
            assert whole == [5], repr(state)
