"""Saves in a thread: the names of `torch.distributed.checkpoint._async_thread_executor`."""

import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine.background.executors import (
    _ThreadBasedAsyncCheckpointExecutor as _ThreadBasedAsyncCheckpointExecutor,
)
from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.save import save

__all__: list[str] = []


def save_wrapper(
    staging_future_or_state_dict: Future[dict[str, Any]] | dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """`save` of a staged state, or of a future of one, which it waits for."""
    staged = staging_future_or_state_dict
    return save(
        staged.result() if isinstance(staged, Future) else staged,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        process_group=process_group,
        no_dist=no_dist,
        use_collectives=use_collectives,
    )


if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
