"""The part of `async_save` after staging, as objects: torch's `_AsyncCheckpointExecutor`.

Libraries that stage a state themselves give the copy, or its future, to `execute_save`.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine.background.async_save import save_staged
from pytest_dcp._engine.verbs.save_request import SaveCall
from pytest_dcp._torch_internals.checkpoint_executors import (
    _AsyncCheckpointExecutor,
    _ProcessExecutor,
    _ThreadExecutor,
)

Staged = Future[dict[str, Any]] | dict[str, Any]


class _BackgroundExecutor(_AsyncCheckpointExecutor):
    """Saves in the background; unlike torch's, it may be used for any number of saves."""

    _in_process = False

    def execute_save(
        self,
        staging_future_or_state_dict: Staged,
        *,
        checkpoint_id: str | os.PathLike[str] | None = None,
        storage_writer: StorageWriter | None = None,
        planner: SavePlanner | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        use_collectives: bool = True,
    ) -> Future[Metadata]:
        """Save a staged state, or the future of one; return a future of the metadata. Collective.

        The staged state must not change until the future is done. The future gets all failures,
        those of staging too, on every rank.
        """
        call = SaveCall(
            storage_writer,
            checkpoint_id,
            process_group,
            no_dist,
            use_collectives=use_collectives,
        )
        staged = staging_future_or_state_dict
        return save_staged(staged, call, planner, in_process=self._in_process)


class _ThreadBasedAsyncCheckpointExecutor(_BackgroundExecutor):
    """Saves in a thread."""


class _ProcessBasedAsyncCheckpointExecutor(_BackgroundExecutor):
    """Saves in the rank's background process, which `async_save` uses too."""

    _in_process = True


_ThreadExecutor.register(_ThreadBasedAsyncCheckpointExecutor)
_ProcessExecutor.register(_ProcessBasedAsyncCheckpointExecutor)
