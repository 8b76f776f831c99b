"""Saving: the public names of `torch.distributed.checkpoint.state_dict_saver`."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine.background.async_save import async_save
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.save import Save, read_stateful, save, save_state_dict
from pytest_dcp._engine.verbs.save_request import SaveCall, SaveRequest

__all__ = ["save_state_dict", "save", "async_save", "AsyncCheckpointerType", "AsyncSaveResponse"]

_stateful_to_state_dict = read_stateful
"""Torch's name for it, which other libraries import."""


def _save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
) -> Metadata:
    """As `save_state_dict`, without its warning (torch's name; other libraries import it)."""
    team = SaveCall(
        storage_writer,
        process_group=process_group,
        no_dist=no_dist,
        coordinator_rank=coordinator_rank,
        use_collectives=use_collectives,
    ).open_team()
    chosen = planner or DefaultSavePlanner()
    request = SaveRequest(
        lambda: state_dict, storage_writer, chosen, use_collectives=use_collectives
    )
    return Save(team, request).run()


if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
