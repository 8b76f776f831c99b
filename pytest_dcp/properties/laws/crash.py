"""A save is atomic: whenever it is cut off, a load gives the old checkpoint or the new one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.faults.crash_models import Model
from pytest_dcp.faults.crashes.crash_state import CrashState, Recording
from pytest_dcp.faults.crashes.recording import Desk, Folders, recording
from pytest_dcp.properties.differences import Difference, differences
from pytest_dcp.properties.laws.engine import Engine, expected_warnings
from pytest_dcp.properties.laws.steps import Folder, enter, save
from pytest_dcp.properties.placed import Placed, empty_state
from pytest_dcp.properties.subworlds import first_ranks, on_first_ranks, rank, world_size


def assert_overwrite_atomic(
    old: Placed | None,
    new: Placed,
    folder: Folder,
    *,
    models: Sequence[Model] = ("kill", "posix"),
    budget: int = 200,
    dcp: Engine = checkpoint,
) -> None:
    """Save one state over the other; every folder that a crash could leave must hold one of them,
    complete.

    The save's operations on the folder are recorded. For each model of crashes and file systems,
    rank 0 alone loads up to `budget` states, unsharded. Once the save had returned in any rank, a
    load must give the new state; without an old state, an earlier load may fail. Collective, like
    `assert_round_trip`; `folder` is local.

        def test_a_save_over_another_is_atomic(checkpoint_dir):
            old, new = (StateSpec({"w": TensorSpec((8,), seed=n)}).on() for n in (1, 2))
            assert_overwrite_atomic(old, new, checkpoint_dir, budget=10)
    """
    __tracebackhide__ = True
    enter(*([] if old is None else [old]), new)
    first_ranks(1)
    if old is not None:
        save(dcp, old, folder)
    record = recorded_save(dcp, new, folder)

    def finished() -> list[Difference]:
        # An engine that cannot load even this proves nothing by refusing a crashed folder.
        target = empty_state(new.full())
        with expected_warnings():
            dcp.load(target, checkpoint_id=folder, process_group=first_ranks(1))
        return differences(target, new.full())

    on_first_ranks(1, "loading the saved state", finished)

    def tried() -> list[str]:
        states = (state for model in models for state in record.crash_states(model, budget))
        return [problem for state in states if (problem := _problem(state, old, new, dcp))]

    on_first_ranks(1, "loading after a crash", tried)


def recorded_save(dcp: Engine, placed: Placed, folder: Folder) -> Recording:
    """Record a save to the folder. Collective over the world."""
    __tracebackhide__ = True

    def make_folder() -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    on_first_ranks(world_size(), "making the folder", make_folder)
    record = Recording()
    with recording(Folders([Path(folder)]), _desk(), record):
        save(dcp, placed, folder)
    return record


def _desk() -> Desk:
    """How the ranks of the recording meet: through their process group."""
    place = Path(tempfile.gettempdir())
    if not dist.is_initialized():
        return Desk(place)
    return Desk(place, rank(), _meet)


def _meet(what: str, message: bytes) -> Sequence[bytes]:
    messages: list[Any] = [None] * world_size()
    dist.all_gather_object(messages, message)
    return messages


def _problem(state: CrashState, old: Placed | None, new: Placed, dcp: Engine) -> str | None:
    """The reason why a crash must not leave this state; None if it may."""
    problems = []
    with state.restored() as folder:
        for name, placed in (("new", new), ("old", old)):
            if placed is None or (name == "old" and state.returned):
                continue
            target = empty_state(placed.full())
            try:
                with expected_warnings():
                    dcp.load(target, checkpoint_id=folder, process_group=first_ranks(1))
            except (Exception, CheckpointException) as error:  # noqa: BLE001  # reported below
                if old is None and not state.returned:
                    return None
                problems.append(f"as the {name} one: {type(error).__name__}: {error}"[:500])
                continue
            found = differences(target, placed.full())
            if not found:
                return None
            problems.append(f"as the {name} one: {found[0]}")
    expectation = (
        "the new checkpoint" if state.returned or old is None else "the old or the new one"
    )
    return f"{state!r}: expected {expectation}: {'; '.join(problems)}"
