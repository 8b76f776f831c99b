"""Saving in the background: a copy of the state first, then a save in a thread or in a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp.checkpoint.async_process import save_in_process
from pytest_dcp.checkpoint.coordinate import announce
from pytest_dcp.checkpoint.saving import Save
from pytest_dcp.checkpoint.storage_choice import alone, plain_state, writer_for
from pytest_dcp.checkpoint.store.staging import KEPT, KEPT_SHARED, BlockingAsyncStager, staged
from pytest_dcp.tracebacks import drop_inner_frames

COORDINATOR = 0
Staged = Callable[[], dict[str, Any]]
"""Gives the copy of the state, once it is made; raises what kept it from being made."""


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

    The tensors are copied to the CPU before it returns, or by `async_stager` (or a storage writer
    that is one), whose own future is then part of an AsyncSaveResponse. The memory of the copy is
    kept for the next save: see `staging.release_memory`. Failures, of the copying too, are the
    future's, on every rank.
    Collective: every rank must call it, and wait for one save before it begins the next.
    """
    no_dist = alone(no_dist, "save")
    writer = writer_for(storage_writer, checkpoint_id)
    in_process = AsyncCheckpointerType(async_checkpointer_type) is AsyncCheckpointerType.PROCESS
    stager = async_stager or _own_stager(storage_writer)
    if not no_dist:
        # The save begins after the copy; that this rank ends meanwhile is seen from here on.
        announce(process_group, COORDINATOR)
    copied: Any = None
    failure: Exception | None = None
    try:
        plain = plain_state(state_dict)
        if stager is None:
            copied = staged(plain, KEPT_SHARED if in_process else KEPT)
        else:
            copied = stager.stage(plain)
    except Exception as error:  # noqa: BLE001 - raised by the save, so that all ranks hear of it
        failure = error
    later = copied if isinstance(copied, Future) else None

    def state() -> dict[str, Any]:
        if failure is not None:
            raise failure
        made: dict[str, Any] = copied if later is None else later.result()
        return made

    upload = save_in_process if in_process else _save_in_thread
    uploading = upload(state, writer, planner, process_group, no_dist, use_collectives)
    if later is None:
        if stager is not None and failure is None and stager.should_synchronize_after_execute:
            stager.synchronize_staging()
        return uploading
    staging: Future[None] = Future()
    later.add_done_callback(lambda done: _follow(done, staging))
    # Torch's type has it that the save gives nothing; ours gives the metadata, as `save` does.
    return AsyncSaveResponse(staging, cast(Any, uploading))


def _own_stager(writer: StorageWriter | None) -> AsyncStager | None:
    """The writer, where it says how to stage."""
    own: Any = writer
    if isinstance(own, BlockingAsyncStager) and type(own).stage is BlockingAsyncStager.stage:
        return own if own.cache_staged_state_dict else None
    return own if isinstance(own, AsyncStager) else None


def _save_in_thread(
    state: Staged,
    writer: StorageWriter,
    planner: SavePlanner | None,
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
    use_collectives: bool,
) -> Future[Metadata]:
    save = Save(state, writer, planner, process_group, no_dist, use_collectives=use_collectives)
    pool = ThreadPoolExecutor(1, thread_name_prefix="dcp-async-save")
    uploading = pool.submit(drop_inner_frames(save.run))
    # The thread ends with its only job.
    pool.shutdown(wait=False)
    return uploading


def _follow(done: Future[Any], follower: Future[None]) -> None:
    error = CancelledError() if done.cancelled() else done.exception()
    if error is None:
        follower.set_result(None)
    else:
        follower.set_exception(error)
