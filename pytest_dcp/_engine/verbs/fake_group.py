"""Saves in fake worlds: a process group of torch's FakeProcessGroup has one real rank.

Its collectives return at once and move nothing, so no other rank can take part in a save. A save is
planned for all ranks instead, by `simulation`, and writes nothing. A load is real: it reads this
rank's part (see `coordinate.open_team`).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine.coordinate.open_team import is_fake
from pytest_dcp._engine.verbs.save_request import SaveCall

SIMULATION = "pytest_dcp._engine.simulation.fake_save"
"""By name, since it plans with the parts of a save and so lies above them, and since a program
without fake worlds imports nothing of it."""


def fake_group_of(call: SaveCall) -> dist.ProcessGroup | None:
    """The group of a save, if it is fake; None for a real one, and for a rank alone."""
    if call.no_dist or not dist.is_initialized():
        return None
    group = call.process_group if call.process_group is not None else dist.group.WORLD
    return group if group is not None and is_fake(group) else None


def plan_in_fake_world(
    state_dict: dict[str, Any],
    group: dist.ProcessGroup,
    writer: StorageWriter,
    planner: SavePlanner,
) -> Metadata:
    """The metadata of the checkpoint that all ranks would save; nothing is written.

    Raises PlanError as the real save would, and ValueError for a save that cannot be simulated.
    """
    planned: Metadata = importlib.import_module(SIMULATION).plan_save(
        state_dict, group, writer, planner
    )
    return planned
