"""Saving in the background: a copy of the state first, then an ordinary save in a thread."""

from __future__ import annotations

import enum
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp.checkpoint.saving import Save
from pytest_dcp.checkpoint.storage_choice import alone, plain_state, writer_for
from pytest_dcp.checkpoint.store.staging import copied


class AsyncCheckpointerType(enum.Enum):
    """Where the save goes on while training does."""

    THREAD = "thread"
    PROCESS = "process"


@dataclass
class AsyncSaveResponse:
    """When the state has been copied, and when it is saved."""

    staging_completion: Future[None]
    upload_completion: Future[None]


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Future[Metadata] | AsyncSaveResponse:
    """A future of what `save` returns; the state may be changed as soon as it is returned.

    The tensors are copied to the CPU before it returns, or by `async_stager`, whose own future is
    then part of an AsyncSaveResponse. Failures of the save are the future's. Collective: every
    rank must call it, and wait for one save before it begins the next.

    Raises NotImplementedError for AsyncCheckpointerType.PROCESS.
    """
    if async_checkpointer_type is not AsyncCheckpointerType.THREAD:
        raise NotImplementedError(
            "async_save runs in a thread only: AsyncCheckpointerType.PROCESS is not built yet"
        )
    plain = plain_state(state_dict)
    own_stager: Any = storage_writer
    if async_stager is None and isinstance(own_stager, AsyncStager):
        async_stager = own_stager
    staged: Any = copied(plain) if async_stager is None else async_stager.stage(plain)
    pool = ThreadPoolExecutor(1, thread_name_prefix="dcp-async-save")

    no_dist = alone(no_dist, "save")
    writer = writer_for(storage_writer, checkpoint_id)

    def upload() -> Metadata:
        return Save(
            lambda: staged.result() if isinstance(staged, Future) else staged,
            writer,
            planner,
            process_group,
            no_dist,
            use_collectives=use_collectives,
        ).run()

    uploading: Future[Any] = pool.submit(upload)
    # The thread ends with its only job.
    pool.shutdown(wait=False)
    if not isinstance(staged, Future):
        if async_stager is not None and async_stager.should_synchronize_after_execute:
            async_stager.synchronize_staging()
        return uploading
    staging: Future[None] = Future()
    staged.add_done_callback(lambda done: _follow(done, staging))
    return AsyncSaveResponse(staging, uploading)


def _follow(done: Future[Any], follower: Future[None]) -> None:
    error = done.exception()
    if error is None:
        follower.set_result(None)
    else:
        follower.set_exception(error)
