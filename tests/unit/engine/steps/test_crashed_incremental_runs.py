"""After a crash at any instant of an incremental run its newest whole step is there, and each whole
step has its own values: every state of the folder is tried.

About 1,500 states of five operations under four models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_dcp.checkpoint import load
from pytest_dcp.faults import CrashState, recorded
from support.incremental_runs import incremental

BUDGET = 100_000
"""More than there are of any operation: none is left out."""
MODELS = ("kill", "posix", "ext4-ordered", "nfs")
EXPORTED = "exported"
FROZEN = torch.arange(900.0)


def state_of(step: int) -> dict[str, Any]:
    """A part that never changes, one that changes with each step, one with each second step."""
    return {"f": FROZEN, "w": torch.full((30,), float(step)), "s": torch.full((200,), step // 2)}


def save_steps(*steps: int, keep_last: int | None = None) -> Callable[[Path], None]:
    def save(root: Path) -> None:
        with incremental(root, keep_last=keep_last) as manager:
            for step in steps:
                manager.save(step, state_of(step))

    return save


def save_in_background(root: Path) -> None:
    with incremental(root, keep_last=1) as manager:
        manager.async_save(3, state_of(3))


def hide_the_last_index(root: Path) -> None:
    """Step 3 is not whole, so that a save of step 3 moves it aside."""
    save_steps(2, 3)(root)
    (root / "step-00000003" / ".metadata").unlink()


def go_back(root: Path) -> None:
    with incremental(root) as manager:
        manager.remove_after(1)


def export(root: Path) -> None:
    with incremental(root) as manager:
        manager.export(3, root / EXPORTED)


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@dataclass(frozen=True)
class Case:
    """An operation, and the steps that a load may find after a crash in it, and after its end."""

    prepare: Callable[[Path], None]
    operate: Callable[[Path], None]
    during: frozenset[int]
    after: frozenset[int]


CASES = {
    "save": Case(save_steps(1, 2), save_steps(3), frozenset({2, 3}), frozenset({3})),
    "background save that removes two": Case(
        save_steps(1, 2), save_in_background, frozenset({2, 3}), frozenset({3})
    ),
    "save over a step that is not whole": Case(
        hide_the_last_index, save_steps(3), frozenset({2, 3}), frozenset({3})
    ),
    "removal of later steps": Case(
        save_steps(1, 2, 3), go_back, frozenset({1, 2, 3}), frozenset({1})
    ),
    "export": Case(save_steps(2, 3), export, frozenset({3}), frozenset({3})),
}


@cache
def states_of(case: str, model: Any) -> list[CrashState]:
    chosen = CASES[case]
    return recorded(chosen.operate, chosen.prepare).crash_states(model, budget=BUDGET)


def assert_has_values(folder: Path, step: int) -> None:
    state = {name: torch.full_like(tensor, -1) for name, tensor in state_of(step).items()}
    load(state, checkpoint_id=folder, no_dist=True)
    for name, expected in state_of(step).items():
        assert torch.equal(state[name], expected), f"{name} of {folder.name}"


def find_step(root: Path) -> int:
    """The newest whole step. Each step with an index is whole, and has its values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = incremental(root).steps()
        whole = [step.number for step in steps if step.is_whole]
        indexed = {int(path.parent.name[-8:]) for path in root.glob("step-*/.metadata")}
        assert indexed == set(whole), [step.problem for step in steps]
        for number in whole:
            assert_has_values(root / f"step-{number:08d}", number)
        if (root / EXPORTED / ".metadata").exists():
            assert_has_values(root / EXPORTED, 3)
    return whole[-1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_each_whole_step_has_its_values(case: str, model: str) -> None:
    for state in states_of(case, model):
        allowed = CASES[case].after if state.returned else CASES[case].during
        with state.restored() as root:
            assert find_step(root) in allowed, repr(state)
            if state.returned and case == "export":
                assert_has_values(root / EXPORTED, 3)


@pytest.mark.parametrize(
    "case", ["background save that removes two", "save over a step that is not whole"]
)
def test_an_incremental_run_saves_on_after_a_crash(case: str) -> None:
    for state in states_of(case, "posix")[::12]:
        with state.restored() as root, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_steps(5, 6, keep_last=1)(root)
            assert find_step(root) == 6, repr(state)
            with incremental(root) as manager:
                assert [step.number for step in manager.steps() if step.is_whole] == [6]
