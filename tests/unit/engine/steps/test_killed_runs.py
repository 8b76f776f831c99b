"""SIGKILL amid everything that changes a run: before each change that it makes to the disk.

Promised after each kill: the newest step whose save had returned is found, or a later whole one,
and every step that the rules keep is whole, with its own values; the run goes on, and `gc` leaves
no file of the killed process. The nightly profile kills before every change; the others before a
few, spread over the operation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from pytest_dcp._cli.run_commands import clean_run, prune_run
from pytest_dcp.checkpoint import CheckpointManager, FileSystemReader, FileSystemWriter
from pytest_dcp.faults.tap.operation import Operation
from support.incremental_runs import assert_holds, blank_like, folder_of, spoil
from support.kills import Report, run_and_kill
from support.retention_rules import Rules
from support.runs import manager_of

pytestmark = pytest.mark.filterwarnings("ignore")

IS_NIGHTLY = settings().max_examples >= 10_000
SAMPLE = 3
"""Kills of one operation, unless all are wanted."""
FROZEN = torch.arange(5000.0)
KEEP_ALL = Rules()


def state_of(step: int) -> dict[str, Any]:
    """A part that never changes, one that changes with each step, one with each second step."""
    part = torch.full((3000,), float(step // 2))
    return {"f": FROZEN, "w": torch.full((100,), float(step)), "s": part, "step": step}


def loss_of(step: int) -> float:
    """Odd steps are better, and early ones."""
    return 1.0 - step % 2 + step / 100


def do_nothing(_: int) -> None:
    """Where a process reports to nobody."""


@dataclass(frozen=True)
class Job:
    """A process that saves steps of a run, by rules."""

    rules: Rules = KEEP_ALL
    incremental: bool = False
    in_background: bool = False
    full_every: int | None = None

    def open(self, root: Path) -> CheckpointManager:
        extra = {"full_every": self.full_every} if self.full_every else {}
        return manager_of(root, incremental=self.incremental, **extra, **self.rules.keywords())

    def save(self, root: Path, *steps: int, report: Report = do_nothing) -> None:
        with self.open(root) as manager:
            for step in steps:
                self._save(manager, root, step)
                report(step)

    def _save(self, manager: CheckpointManager, root: Path, step: int) -> None:
        own: dict[str, Any] = {"metrics": {"loss": loss_of(step)}}
        if not self.incremental:
            own["storage_writer"] = FileSystemWriter(folder_of(root, step), thread_count=2)
        if self.in_background:
            manager.async_save(step, state_of(step), **own)
            manager.wait()
        else:
            manager.save(step, state_of(step), **own)


PLAIN = Job()


@dataclass(frozen=True)
class Case:
    """An operation on a run, and the steps that a kill in it must leave whole."""

    before: tuple[int, ...]
    """The whole steps."""
    operate: Callable[[Path, Report], None]
    saved: tuple[int, ...] = ()
    """The steps that it saves."""
    job: Job = PLAIN
    """Saves the steps before, and goes on after the kill."""
    rules: Rules = KEEP_ALL
    """By which the operation removes steps."""
    wreck: Callable[[Path], None] = lambda root: None
    """What else has happened before."""

    def kept(self, newest: int) -> set[int]:
        """The steps that are whole for sure if this is the newest whole one."""
        kept = self.rules.keep(losses(self.before))
        for step in self.saved:
            kept = self.rules.keep(losses(kept | {step})) if step <= newest else kept
        return kept if newest in self.saved else kept | self._untouched()

    def _untouched(self) -> set[int]:
        """Saves remove steps when they have ended; what only removes begins at once."""
        return set(self.before) if self.saved else set()


def losses(steps: Any) -> dict[int, float]:
    return {step: loss_of(step) for step in steps}


def saving(before: tuple[int, ...], saved: tuple[int, ...], **keywords: Any) -> Case:
    """One job saves these steps after those."""
    wreck = keywords.pop("wreck", lambda root: None)
    job = Job(**keywords)
    return Case(
        before,
        lambda root, report: job.save(root, *saved, report=report),
        saved,
        job,
        job.rules,
        wreck,
    )


# What a killed save, a killed removal, and a bad disk leave.


def kill_save(root: Path, step: int, job: Job = PLAIN) -> None:
    """At its last instant: all is written, and nothing committed."""

    def is_commit(_: int, operation: Operation) -> bool:
        is_index = (operation.to or "").endswith("/.metadata")
        return operation.kind == "rename" and is_index

    assert run_and_kill(lambda _: job.save(root, step), root, is_commit).is_killed


def kill_removal(root: Path, step: int) -> None:
    def is_data(_: int, operation: Operation) -> bool:
        return operation.kind == "remove" and operation.path.endswith(".distcp")

    def remove(_: Report) -> None:
        with manager_of(root) as manager:
            manager.remove_after(step - 1)

    assert run_and_kill(remove, root, is_data).is_killed


def leave_wrecks(root: Path) -> None:
    """Of step 3 a removal and of step 4 a save that have not ended; another save of 4 is aside."""
    PLAIN.save(root, 3)
    kill_removal(root, 3)
    kill_save(root, 4)
    kill_save(root, 4)


def spoil_data(root: Path, step: int) -> None:
    for path in folder_of(root, step).glob("*.distcp"):
        spoil(path)


# Operations.


def prune(root: Path, report: Report) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        prune_run(str(root), keep_last=1, keep_every=3, best="loss:min:2")


def clean(root: Path, report: Report = do_nothing) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        clean_run(str(root), quarantined=True)


def go_back(root: Path, report: Report) -> None:
    with manager_of(root) as manager:
        manager.remove_after(2)


def find_and_resume(root: Path, report: Report) -> None:
    """Go on from the newest whole step: the one after it is moved aside."""
    with manager_of(root) as manager:
        loaded = manager.load_latest(blank_like(state_of(0)))
        assert loaded is not None
        assert loaded.number == 2
        manager.save(3, state_of(3), metrics={"loss": loss_of(3)})
        report(3)


INCREMENTAL = Job(incremental=True)
CASES = {
    "save": saving((1, 2), (3, 4)),
    "background save": saving((1, 2), (3, 4), in_background=True),
    "save that keeps the last": saving((1, 2, 3), (4, 5), rules=Rules(1)),
    "save that keeps two": saving((1, 2, 3), (4, 5), rules=Rules(2), in_background=True),
    "save that keeps by all rules": saving(tuple(range(1, 7)), (7, 8), rules=Rules(1, 3, 2)),
    "incremental save": saving((1, 2), (3, 4), incremental=True, rules=Rules(2)),
    "incremental save in the background": saving(
        (1, 2), (3, 4), incremental=True, rules=Rules(1), in_background=True, full_every=2
    ),
    "save over a killed one": saving((1, 2), (3,), wreck=lambda root: kill_save(root, 3)),
    "incremental save over a killed one": saving(
        (1, 2), (3,), incremental=True, wreck=lambda root: kill_save(root, 3, INCREMENTAL)
    ),
    "damaged step is passed over and replaced": Case(
        (1, 2), find_and_resume, (3,), wreck=lambda root: (PLAIN.save(root, 3), spoil_data(root, 3))
    ),
    "prune": Case(tuple(range(1, 8)), prune, rules=Rules(1, 3, 2)),
    "prune of incremental steps": Case(
        tuple(range(1, 8)), prune, job=INCREMENTAL, rules=Rules(1, 3, 2)
    ),
    "gc": Case((1, 2), clean, wreck=leave_wrecks),
    "removal of later steps": Case((1, 2), go_back, wreck=lambda root: PLAIN.save(root, 3, 4)),
}


def prepare(case: Case, root: Path) -> None:
    """The run before the operation."""
    Job(incremental=case.job.incremental).save(root, *case.before)
    case.wreck(root)


def moments_of(case: Case, folder: Path) -> Iterator[int]:
    """Numbers of changes to kill before, spread over the operation."""
    prepare(case, folder)
    ended = run_and_kill(lambda report: case.operate(folder, report), folder)
    assert not ended.is_killed
    assert ended.reports == list(case.saved)
    count = ended.changes
    if IS_NIGHTLY:
        yield from range(1, count + 1)
    else:
        yield from (1 + (2 * n + 1) * count // (2 * SAMPLE) for n in range(SAMPLE))


@pytest.mark.parametrize("name", CASES)
def test_a_kill_loses_no_step_that_was_saved_and_is_kept(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    kills = 0
    for moment in moments_of(case, tmp_path / "whole"):
        root = tmp_path / f"killed-{moment}"
        prepare(case, root)
        ended = run_and_kill(
            lambda report, root=root: case.operate(root, report),
            root,
            lambda number, _, moment=moment: number == moment,
        )
        kills += ended.is_killed  # threads may have made fewer changes this time
        try:
            newest = require_whole(case, root, ended.reports)
            go_on(case.job, root, newest)
        except BaseException:
            print(f"{name}, killed before change {moment}, in {root}")
            raise
    assert kills
    print(f"{kills} kills")


def require_whole(case: Case, root: Path, reports: list[int]) -> int:
    """Check what the kill has left; returns the newest whole step."""
    state = blank_like(state_of(0))
    loaded = manager_of(root).load_latest(state)
    assert loaded is not None
    assert loaded.number >= max([*case.before, *reports])
    assert_equal(state, state_of(loaded.number))
    assert loaded.metrics == {"loss": loss_of(loaded.number)}
    found = manager_of(root, check="checksums").steps()
    whole = {step.number for step in found if step.is_whole}
    assert case.kept(loaded.number) <= whole
    assert max(whole) == loaded.number
    for step in whole:
        assert_holds(folder_of(root, step), state_of(step))
    return loaded.number


def assert_equal(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        same = torch.equal(state[name], value) if name != "step" else state[name] == value
        assert same, f"{name} is {state[name]}"


def go_on(job: Job, root: Path, newest: int) -> None:
    """Save the next step, as a fresh process does; a clean-up leaves nothing but whole steps."""
    step = newest + 1
    with job.open(root) as manager:
        assert manager.load_latest(blank_like(state_of(0))) is not None
        manager.save(step, state_of(step), metrics={"loss": loss_of(step)})
        latest = manager.latest()
        assert latest is not None
        assert latest.number == step
    assert_holds(folder_of(root, step), state_of(step))
    clean(root)
    assert files_below(root) == files_of_steps(root)


def files_below(root: Path) -> set[str]:
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return found - {"latest.json", ".steps.lock"}


def files_of_steps(root: Path) -> set[str]:
    """The index, the notes, and the files that the index names."""
    names = set()
    for folder in root.glob("step-*"):
        stored = FileSystemReader(folder).read_metadata().storage_data.values()
        inside = {".metadata", "step.json"} | {one.relative_path for one in stored}
        names |= {f"{folder.name}/{name}" for name in inside}
    return names
