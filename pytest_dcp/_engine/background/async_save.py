"""Saving in the background: a copy of the state first, then a save in a thread or in a process."""

from __future__ import annotations

import os
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine.background.process import Job, save_in_process, sendable
from pytest_dcp._engine.coordinate import announce
from pytest_dcp._engine.plan.hooks import overridden
from pytest_dcp._engine.plan.replica_comparison import ReplicaCheck
from pytest_dcp._engine.staging.stager import KEPT, KEPT_SHARED, BlockingAsyncStager, stage_state
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.verbs.save import Save, SaveRequest, planner_for, save_team
from pytest_dcp._engine.verbs.torch_arguments import (
    alone,
    check_state_dict,
    reset_to,
    resolve_stateful,
    writer_for,
)
from pytest_dcp.tracebacks import drop_inner_frames, forget_frames

COORDINATOR = 0


@drop_inner_frames
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
    replicas: ReplicaCheck | None = None,
) -> Future[Metadata] | AsyncSaveResponse:
    """Save in the background; return a future of the metadata. Afterwards the state may change.

    The tensors are copied to the CPU before it returns, or by `async_stager` (or a storage writer
    that is one), whose own future is then part of an AsyncSaveResponse. The memory of the copy is
    kept for the next save: see `staging.release_memory`. The future gets all failures, even those
    of copying, on every rank.
    Collective: every rank must call it, in the same order as its other saves and loads of the
    group. It may be called again before the last one is done: the saves of a group, including
    `save`, run one after another in the order of their calls, each with the state at its call.

    replicas: as for `save`; the copies are compared while the state is saved, also in a process.

    >>> import torch
    >>> from pytest_dcp.checkpoint import async_save, load_without_template
    >>> state = {"w": torch.ones(2)}
    >>> future = async_save(state, checkpoint_id="step-1")
    >>> _ = state["w"].zero_()  # training goes on: the save has its own copy
    >>> metadata = future.result()
    >>> load_without_template(checkpoint_id="step-1")
    {'w': tensor([1., 1.])}
    """
    no_dist = alone(no_dist, "save")
    in_process = AsyncCheckpointerType(async_checkpointer_type) is AsyncCheckpointerType.PROCESS
    team = save_team(
        process_group,
        no_dist,
        COORDINATOR,
        storage_writer,
        checkpoint_id,
        use_collectives=use_collectives,
        operation="async_save" if in_process else "save",
        background=True,
    )
    if not no_dist:
        # The save begins after the copy; from here on the others see if this rank ends meanwhile.
        announce(process_group, COORDINATOR)
    with team.preparing():
        check_state_dict(state_dict)
        chosen = planner_for(planner, replicas)
        writer = writer_for(storage_writer, checkpoint_id)
        reset = reset_to(storage_writer, checkpoint_id)
        stager = async_stager or _own_stager(storage_writer)
        _heed_stage(storage_writer, stager)
        how = sendable(writer, chosen) if in_process else b""
        staging = _Staging(state_dict, stager, shared=in_process)
    if in_process:
        job = Job(team, staging.state, how, reset and checkpoint_id, use_collectives)
        uploading = save_in_process(job)
    else:
        uploading = _save_in_thread(
            Save(
                team,
                SaveRequest(
                    staging.state, writer, chosen, use_collectives=use_collectives, reset=reset
                ),
            )
        )
    return staging.response(uploading)


class _Staging:
    """The copy of a state: done, failed, or under way."""

    def __init__(
        self, state_dict: dict[str, Any], stager: AsyncStager | None, *, shared: bool
    ) -> None:
        """Copy, or let the stager begin to. An exception is kept for the save."""
        self._stager = stager
        self._copied: Any = None
        self._failure: Exception | None = None
        try:
            plain = resolve_stateful(state_dict)
            if stager is None:
                self._copied = stage_state(plain, KEPT_SHARED if shared else KEPT)
            else:
                self._copied = stager.stage(plain)
        except Exception as error:  # noqa: BLE001 - raised by the save, so that all ranks receive it
            self._failure = error

    def state(self) -> dict[str, Any]:
        """The copy, once it is made; raises the error that prevented it."""
        if self._failure is not None:
            raise self._failure
        made: dict[str, Any] = (
            self._copied.result() if isinstance(self._copied, Future) else self._copied
        )
        return made

    def response(self, uploading: Future[Metadata]) -> Future[Metadata] | AsyncSaveResponse:
        """The result of `async_save`."""
        stager, later = self._stager, self._copied
        if isinstance(stager, BlockingAsyncStager):
            stager.hold_for(uploading)
        if isinstance(later, Future):
            staging: Future[None] = Future()
            later.add_done_callback(lambda done: _follow(done, staging))
            # In torch's type the save returns nothing; ours returns the metadata, as `save` does.
            return AsyncSaveResponse(staging, cast(Any, uploading))
        if stager is not None and self._failure is None and stager.should_synchronize_after_execute:
            stager.synchronize_staging()
        return uploading


STAGING_HOOKS = ("stage", "synchronize_staging", "should_synchronize_after_execute")


def _own_stager(writer: StorageWriter | None) -> AsyncStager | None:
    """The writer, if it stages in its own way."""
    own: Any = writer
    if isinstance(own, FileSystemWriter):
        changed = overridden(own, FileSystemWriter, STAGING_HOOKS)
        synchronizes = own.should_synchronize_after_execute
        return own if own.cache_staged_state_dict or changed or synchronizes else None
    return own if isinstance(own, AsyncStager) else None


def _heed_stage(writer: StorageWriter | None, stager: AsyncStager | None) -> None:
    """The side effects of the writer's own `stage`, if the copying is done without it."""
    if stager is None and isinstance(writer, FileSystemWriter):
        writer.per_thread_copy_ahead = 0


def _save_in_thread(save: Save) -> Future[Metadata]:
    uploading: Future[Metadata] = Future()
    # It has begun: it has its place among the group's operations.
    uploading.set_running_or_notify_cancel()

    def run() -> None:
        try:
            metadata = save.run()
        except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
            forget_frames(error)
            uploading.set_exception(error)
        else:
            uploading.set_result(metadata)

    pool = ThreadPoolExecutor(1, thread_name_prefix="dcp-async-save")
    pool.submit(run)
    # The thread ends with its only job.
    pool.shutdown(wait=False)
    return uploading


def _follow(done: Future[Any], follower: Future[None]) -> None:
    error = CancelledError() if done.cancelled() else done.exception()
    if error is None:
        follower.set_result(None)
    else:
        follower.set_exception(error)
