"""Saves and loads with the same storages and planners each time: torch's `_Checkpointer`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from pytest_dcp._engine.background.async_save import async_save
from pytest_dcp._engine.verbs.load import load
from pytest_dcp._engine.verbs.save import save
from pytest_dcp._torch_internals.checkpoint_executors import _CheckpointerOfTorch


class _Checkpointer(_CheckpointerOfTorch):
    """Saves and loads state dicts with the storages, planners and group that it was made with.

    torch's class of this name is a base for the sake of `isinstance`; all methods are ours.
    """

    def __init__(
        self,
        storage_writer: StorageWriter,
        storage_reader: StorageReader,
        *,
        process_group: dist.ProcessGroup | None = None,
        coordinator_rank: int = 0,
        no_dist: bool = False,
        load_planner: LoadPlanner | None = None,
        save_planner: SavePlanner | None = None,
    ) -> None:
        """coordinator_rank: accepted for the sake of torch's callers; the engine's choice counts.

        The other arguments are those of `save` and `load`.
        """
        self.storage_writer = storage_writer
        self.storage_reader = storage_reader
        self.process_group = process_group
        self.coordinator_rank = coordinator_rank
        self.no_dist = no_dist
        self.load_planner = load_planner
        self.save_planner = save_planner

    def save(self, state_dict: dict[str, Any]) -> Metadata:
        """`save` with these storages. Collective."""
        return save(
            state_dict,
            storage_writer=self.storage_writer,
            process_group=self.process_group,
            no_dist=self.no_dist,
            planner=self.save_planner,
        )

    def async_save(self, state_dict: dict[str, Any]) -> Future[Metadata]:
        """`async_save` with these storages; a future of the metadata. Collective."""
        saving = async_save(
            state_dict,
            storage_writer=self.storage_writer,
            process_group=self.process_group,
            no_dist=self.no_dist,
            planner=self.save_planner,
        )
        if isinstance(saving, AsyncSaveResponse):  # The storage writer stages in its own way.
            return cast("Future[Metadata]", saving.upload_completion)
        return saving

    def load(self, state_dict: dict[str, Any]) -> None:
        """`load` with these storages, into the state dict. Collective."""
        load(
            state_dict,
            storage_reader=self.storage_reader,
            process_group=self.process_group,
            no_dist=self.no_dist,
            planner=self.load_planner,
        )
