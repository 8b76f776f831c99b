"""Saves and loads with a fault at one hook, and the result on every rank.

The oracle is the value of a state: the one saved before or the one being saved, nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as dcp
from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.checkpoint.staging import DefaultStager
from pytest_dcp.faults import HOOKS, Fault, FaultyStorage

Verb = Literal["save", "async_save", "load"]
OLD, NEW = 1, 2

VERBS: Mapping[str, Verb] = {
    "writer": "save", "save_planner": "save", "stager": "async_save",
    "reader": "load", "load_planner": "load",
}  # fmt: skip
HOOK_NAMES = [f"{role}.{hook}" for role, hooks in HOOKS.items() for hook in hooks]


def state(fill: int) -> dict[str, Any]:
    """A state that is the same on every rank: tensors for each to write, and values."""
    parts = {f"part{n}": torch.full((4,), float(fill * 10 + n)) for n in range(4)}
    return {"w": torch.full((6, 3), float(fill)), "epoch": fill, "more": {"a": [fill]}, **parts}


def blank() -> dict[str, Any]:
    return state(-1)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


@dataclass(frozen=True, slots=True)
class RankRun:
    """One rank's result of a run."""

    error: str
    """Class of the error; empty if the call returned."""
    named_ranks: tuple[int, ...]
    """Ranks that the error names."""
    text: str
    right: bool
    """A load that returned: whether all values are those of the checkpoint."""


def run(verb: Verb, storage: FaultyStorage, group: dist.ProcessGroup | None = None) -> RankRun:
    """The verb, with everything wrapped; in a rank."""
    target = blank()
    try:
        if verb == "save":
            _save(storage, group)
        elif verb == "async_save":
            _async_save(storage, group)
        else:
            _load(target, storage, group)
    except CheckpointException as error:
        named_ranks = tuple(sorted(error.failures))
        return RankRun("CheckpointException", named_ranks, str(error), right=False)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - which it is, is looked at
        return RankRun(type(error).__name__, (), str(error), right=False)
    return RankRun("", (), "", right=verb != "load" or equal(target, state(OLD)))


def _save(storage: FaultyStorage, group: dist.ProcessGroup | None) -> None:
    dcp.save(
        state(NEW),
        storage_writer=storage.writer(dcp.FileSystemWriter(storage.checkpoint_dir)),
        planner=storage.planner(dcp.DefaultSavePlanner()),
        process_group=group,
    )


def _async_save(storage: FaultyStorage, group: dist.ProcessGroup | None) -> None:
    answer: Any = dcp.async_save(
        state(NEW),
        storage_writer=storage.writer(dcp.FileSystemWriter(storage.checkpoint_dir)),
        planner=storage.planner(dcp.DefaultSavePlanner()),
        async_stager=storage.stager(DefaultStager()),
        process_group=group,
    )
    getattr(answer, "upload_completion", answer).result()


def _load(target: dict[str, Any], storage: FaultyStorage, group: dist.ProcessGroup | None) -> None:
    dcp.load(
        target,
        storage_reader=storage.reader(dcp.FileSystemReader(storage.checkpoint_dir)),
        planner=storage.planner(dcp.DefaultLoadPlanner()),
        process_group=group,
    )


def run_or_die(storage: FaultyStorage, hook: str, timeout_s: float) -> RankRun:
    """`run` with a fault that came along with the storage, in a rank of a world of its own."""
    group = dist.new_group(timeout=timedelta(seconds=timeout_s)) if timeout_s else None
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
    with storage:
        return run(verb_of(hook), storage, group)


def save_old(folder: Path) -> None:
    """The old checkpoint, by this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state(OLD), checkpoint_id=folder, no_dist=True)


def verb_of(hook: str) -> Verb:
    return VERBS[hook.partition(".")[0]]


class Kept:
    """A folder that holds the old checkpoint, as it was when it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {file.name: file.read_bytes() for file in folder.iterdir()}

    def look(self) -> int | None:
        """Which state the folder holds, whole, or None; then the old one is put back."""
        if {file.name: file.read_bytes() for file in self.folder.iterdir()} == self._files:
            return OLD
        found = loadable_state(self.folder)
        for file in self.folder.iterdir():
            file.unlink()
        for name, data in self._files.items():
            (self.folder / name).write_bytes(data)
        return found


def loadable_state(folder: Path) -> int | None:
    """Which state the folder holds, whole; as this process alone sees it."""
    target = blank()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(target, checkpoint_id=folder, no_dist=True)
    except CheckpointException:
        return None
    return next((fill for fill in (OLD, NEW) if equal(target, state(fill))), None)


class Bench:
    """Runs one case after the other in a warm world. Collective."""

    def __init__(self, folder: Path, world: RankWorld) -> None:
        self.folder = folder / "checkpoint"
        self.world = world
        self.cases = 0
        self.fired = 0
        self._counts = folder / "counts"
        dcp.save(state(OLD), checkpoint_id=self.folder)
        self._snapshot = Kept(self.folder) if world.rank == 0 else None
        self.world.barrier()

    def case(self, hook: str, fault: Fault, rank: int | None) -> Case:
        """Run with the fault at the hook, on one rank or (None) on all."""
        self.cases += 1
        counts = self._counts / str(self.cases)
        verb = verb_of(hook)
        with FaultyStorage(self.folder, counts) as storage:
            injected = storage.inject(fault, on=hook, rank=rank, must_fire=False)
            runs = self.world.gather(run(verb, storage))
            fired = injected.fired_by_rank
        self.fired += bool(fired)
        holds: int | None = OLD
        if verb != "load":
            holds = self.world.broadcast(
                self._snapshot.look() if self._snapshot is not None else None
            )
        return Case(f"{fault!r} on {hook}, rank {rank}", tuple(sorted(fired)), runs, holds)


@dataclass(frozen=True, slots=True)
class Case:
    """All ranks' results of one run."""

    name: str
    fired: tuple[int, ...]
    """Ranks in which the fault fired."""
    runs: list[RankRun]
    holds: int | None
    """Which state the folder held afterwards, whole."""

    @property
    def raised(self) -> bool:
        """Whether every rank raised the error that names ranks."""
        return all(one.error == "CheckpointException" for one in self.runs)

    @property
    def agreed(self) -> bool:
        """Whether every rank got the same error, in the same words."""
        return len({(one.error, one.named_ranks, one.text) for one in self.runs}) == 1

    @property
    def returned(self) -> bool:
        """Whether every rank returned, with the right values."""
        return all(not one.error and one.right for one in self.runs)
