"""A crash during anything that changes a run: retention, prune, gc, quarantine, a second crash.

After it the newest whole step is found, and no step that the rules keep is lost. The nightly
profile tries every state, 10,000 and more with those of `test_crashed_runs`; the others a sample.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from pytest_dcp._engine.steps.clean_run import remove_leftovers
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.retention import BestSteps, RetentionPolicy
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp.checkpoint import CheckpointManager, FileSystemWriter
from pytest_dcp.faults import CrashState, recorded

IS_NIGHTLY = settings().max_examples >= 10_000
MODELS = ("kill", "posix", "ext4-ordered", "nfs") if IS_NIGHTLY else ("posix",)
SAMPLE = 6
"""States of one operation under one model."""
BUDGET = 100_000
SECOND = 12 if IS_NIGHTLY else 1
"""First crashes after which each operation of recovery crashes, too."""


def state_of(step: int) -> dict[str, Any]:
    return {f"w{n}": torch.full((40,), float(step + n)) for n in range(4)} | {"step": step}


def blank() -> dict[str, Any]:
    return {f"w{n}": torch.zeros(40) for n in range(4)} | {"step": -1}


def manager_of(root: Path, **keywords: Any) -> CheckpointManager:
    return CheckpointManager(root, no_dist=True, **keywords)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save_steps(*steps: int, **keywords: Any) -> Callable[[Path], None]:
    """Save these steps, each by several threads in files of their own; odd ones are better."""

    def save(root: Path) -> None:
        with manager_of(root, **keywords) as manager:
            for step in steps:
                own: dict[str, Any] = {}
                if not keywords.get("incremental"):
                    own["storage_writer"] = FileSystemWriter(folder_of(root, step), thread_count=2)
                metrics = {"loss": 1.0 - step % 2 + step / 100}
                manager.save(step, state_of(step), metrics=metrics, **own)

    return save


def save_in_background(*steps: int, **keywords: Any) -> Callable[[Path], None]:
    def save(root: Path) -> None:
        with manager_of(root, **keywords) as manager:
            for step in steps:
                manager.async_save(step, state_of(step))

    return save


def hide_index(root: Path, step: int) -> None:
    (folder_of(root, step) / ".metadata").unlink()


def leave_wrecks(root: Path) -> None:
    """Steps 1 and 2 are whole; of 3 there is a begun save, of 4 a begun removal, 2 aside."""
    save_steps(1, 2)(root)
    hide_index(root, 2)
    save_steps(2, 3, 4)(root)
    hide_index(root, 3)
    hide_index(root, 4)
    (folder_of(root, 4) / "removal.json").write_text('{"files": []}')


def clean(root: Path) -> None:
    known = KnownSteps(RunPlace(root), RetentionPolicy(), "sizes")
    remove_leftovers(known, quarantined=True)


def prune(root: Path) -> None:
    policy = RetentionPolicy(1, 3, BestSteps("loss", "min", 1))
    KnownSteps(RunPlace(root), policy, "sizes").remove_old(1)


def quarantine_twice(root: Path) -> None:
    """Two saves of step 3 are lost, and moved aside by the next."""
    for _ in range(2):
        save_steps(3)(root)
        hide_index(root, 3)
    save_steps(3)(root)


def go_back(root: Path) -> None:
    with manager_of(root) as manager:
        manager.remove_after(2)


@dataclass(frozen=True)
class Case:
    """An operation; the steps that a load may find after a crash in it, and those never lost."""

    prepare: Callable[[Path], None]
    operate: Callable[[Path], None]
    found: frozenset[int]
    kept: frozenset[int]


def case(
    prepare: Callable[[Path], None],
    operate: Callable[[Path], None],
    found: set[int],
    kept: set[int],
) -> Case:
    return Case(prepare, operate, frozenset(found), frozenset(kept))


FIVE = save_steps(1, 2, 3, 4, 5)
CASES = {
    "save that removes several": case(FIVE, save_steps(6, keep_last=2), {5, 6}, {5}),
    "retention by all rules": case(
        FIVE,
        save_steps(6, keep_last=1, keep_every=2, best=("loss", "min", 1)),
        {5, 6},
        {1, 2, 4},
    ),
    "two saves that remove": case(FIVE, save_steps(6, 7, keep_last=3), {5, 6, 7}, {5}),
    "background saves that remove": case(
        FIVE, save_in_background(6, 7, keep_last=2), {5, 6, 7}, set()
    ),
    "prune": case(FIVE, prune, {5}, {1, 3, 5}),
    "gc": case(leave_wrecks, clean, {2}, {1, 2}),
    "quarantine, twice": case(save_steps(1, 2), quarantine_twice, {2, 3}, {1, 2}),
    "removal of several later steps": case(FIVE, go_back, {2, 3, 4, 5}, {1, 2}),
    "incremental save that removes": case(
        save_steps(1, 2, 3, incremental=True),
        save_steps(4, incremental=True, keep_last=2),
        {3, 4},
        {3},
    ),
}
TWICE_CRASHED = ["save that removes several", "retention by all rules", "gc"][
    : 3 if IS_NIGHTLY else 1
]
RECOVERIES: dict[str, Callable[[Path], None]] = {
    "save": save_steps(9, keep_last=2),
    "gc": clean,
    "prune": prune,
}


@cache
def states_of(name: str, model: Any) -> list[CrashState]:
    chosen = CASES[name]
    return recorded(chosen.operate, chosen.prepare).crash_states(model, budget=BUDGET)


def sample(states: list[CrashState], count: int) -> list[CrashState]:
    """Evenly from all moments; in the nightly profile all of them."""
    return states if IS_NIGHTLY else states[:: max(1, len(states) // count)]


def whole_steps(root: Path) -> set[int]:
    """Whole by every byte."""
    with manager_of(root, check="checksums") as manager:
        return {step.number for step in manager.steps() if step.is_whole}


def assert_nothing_is_lost(root: Path, found: frozenset[int], kept: frozenset[int]) -> None:
    state = blank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = manager_of(root).load_latest(state)
        assert loaded is not None
        assert loaded.number in found
        for name, expected in state_of(loaded.number).items():
            actual = state[name]
            same = torch.equal(actual, expected) if name != "step" else actual == expected
            assert same, f"{name} of step {loaded.number} is {actual}"
        whole = whole_steps(root)
    assert kept <= whole
    assert loaded.number == max(whole)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CASES)
def test_no_step_that_is_kept_is_lost(name: str, model: str) -> None:
    chosen = CASES[name]
    for state in sample(states_of(name, model), SAMPLE):
        with state.restored() as root:
            try:
                assert_nothing_is_lost(root, chosen.found, chosen.kept)
            except BaseException:
                print(f"{name}: {state!r}")
                raise


def first_crashes(name: str) -> Iterator[CrashState]:
    states = states_of(name, "posix")
    yield from states[len(states) // 5 :: max(1, len(states) // SECOND)]


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("name", TWICE_CRASHED)
def test_a_second_crash_during_recovery_loses_nothing(name: str, recovery: str) -> None:
    count = 0
    for first in first_crashes(name):
        with first.restored() as folder:
            newest = max(whole_steps(folder))

        def restore(root: Path, first: CrashState = first) -> None:
            with first.restored() as folder:
                shutil.copytree(folder, root, dirs_exist_ok=True, symlinks=True)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = recorded(RECOVERIES[recovery], restore)
        if not again.operations:  # the first crash has left nothing to do
            continue
        found = frozenset({newest, 9} if recovery == "save" else {newest})
        for state in sample(again.crash_states("posix", budget=BUDGET), 2 * SAMPLE):
            count += 1
            with state.restored() as root:
                try:
                    assert_nothing_is_lost(root, found, frozenset())
                except BaseException:
                    print(f"{name}: {first!r}, then {recovery}: {state!r}")
                    raise
    print(f"{count} states of a second crash")


@pytest.mark.skipif(not IS_NIGHTLY, reason="counts all states: for the nightly profile")
def test_the_states_are_as_many_as_promised() -> None:
    count = sum(len(states_of(name, model)) for name in CASES for model in MODELS)
    print(f"{count} crash states")
    assert count > 5_000
