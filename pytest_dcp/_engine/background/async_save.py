"""Saving in the background: a copy of the state first, then a save in a thread or in a process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.background.futures import wrap_future
from pytest_dcp._engine.background.process import Job, State, pickle_for_process, save_in_process
from pytest_dcp._engine.coordinate import Team, announce
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.plan.replica_comparison import ReplicaCheck
from pytest_dcp._engine.plan.storage_capabilities import holds_copy, stages_at_will
from pytest_dcp._engine.staging.stager import KEPT, KEPT_SHARED, stage_state, stage_within_budget
from pytest_dcp._engine.staging.unstaged_tensors import UnstagedTensors
from pytest_dcp._engine.verbs.call_events import CallEvents
from pytest_dcp._engine.verbs.phase_timing import logger
from pytest_dcp._engine.verbs.save import Save, planner_for, read_stateful
from pytest_dcp._engine.verbs.save_request import SaveCall, SaveRequest
from pytest_dcp._engine.verbs.torch_arguments import check_state_dict, resolve_no_dist
from pytest_dcp.errors import SaverProcessError
from pytest_dcp.tracebacks import drop_inner_frames, forget_frames, forget_locals


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
    progress: Callable[[Progress], None] | None = None,
    replicas: ReplicaCheck | None = None,
    storage_options: Mapping[str, Any] | None = None,
    staging_budget: int | None = None,
) -> Future[Metadata] | AsyncSaveResponse:
    """Save in the background; return a future of the metadata. Afterwards the state may change.

    The tensors are copied to the CPU before it returns, or by `async_stager` (or a storage writer
    that is one), whose own future is then part of an AsyncSaveResponse. The memory of the copy is
    kept for the next save: see `staging.release_memory`. The future gets all failures, even those
    of copying, on every rank.
    Collective: every rank must call it, in the same order as its other saves and loads of the
    group. It may be called again before the last one is done: the saves of a group, including
    `save`, run one after another in the order of their calls, each with the state at its call.

    progress, replicas: as for `save`. Progress is called in a thread of the background save; an
    exception of it ends the save on every rank. Copies are compared while the state is saved.
    storage_options: as for `save`.
    staging_budget: the most bytes that copies of plain tensors may take in this rank, for all saves
        under way; other values are always copied. Tensors that do not fit are written from their
        own memory, first of all, and the call returns once they are written: 0 copies none. Then it
        waits for the other ranks, and for the saves before it, too. For saves in a thread, without
        a stager. Raises ValueError.

    >>> import torch
    >>> from pytest_dcp.checkpoint import async_save, load_without_template
    >>> state = {"w": torch.ones(2)}
    >>> future = async_save(state, checkpoint_id="step-1")
    >>> _ = state["w"].zero_()  # training goes on: the save has its own copy
    >>> metadata = future.result()
    >>> load_without_template(checkpoint_id="step-1")
    {'w': tensor([1., 1.])}
    """
    arguments = {
        "checkpoint_id": checkpoint_id,
        "storage_writer": storage_writer,
        "planner": planner,
        "process_group": process_group,
    }
    in_process = AsyncCheckpointerType(async_checkpointer_type) is AsyncCheckpointerType.PROCESS
    with CallEvents("async_save", arguments, log_exceptions=True):
        call = SaveCall(
            storage_writer,
            checkpoint_id,
            process_group,
            resolve_no_dist(no_dist, "save"),
            use_collectives=use_collectives,
            storage_options=storage_options,
        )
        team = _background_team(call, in_process=in_process)
        with team.preparing():
            check_state_dict(state_dict)
            chosen = planner_for(planner, replicas)
            stager = async_stager or _own_stager(storage_writer)
            if staging_budget is not None:
                _require_own_staging(staging_budget, stager, in_process=in_process)
            job = _prepare_job(team, call, chosen, progress, in_process=in_process)
            if stager is None and staging_budget is None:
                _skip_stage(storage_writer)
            staging = _Staging(state_dict, stager, shared=in_process, budget_bytes=staging_budget)
        try:
            return staging.response(job(staging.state, staging.unstaged))
        except BaseException:
            # Ctrl-C, also before the wait: the caller may change its tensors from here on.
            if staging.unstaged is not None:
                staging.unstaged.abandon()
            raise


def _require_own_staging(
    budget_bytes: int, stager: AsyncStager | None, *, in_process: bool
) -> None:
    """Raise ValueError or TypeError unless this save can keep to the budget."""
    if not isinstance(budget_bytes, int) or isinstance(budget_bytes, bool):
        raise TypeError(f"staging_budget is a number of bytes; got {budget_bytes!r:.200}")
    if budget_bytes < 0:
        raise ValueError(f"staging_budget is a number of bytes, 0 or more; got {budget_bytes}")
    if in_process:
        raise ValueError(
            "staging_budget is for saves in a thread: another process can save only what was "
            "copied for it"
        )
    if stager is not None:
        raise ValueError(
            f"staging_budget is for the engine's own copies: {type(stager).__name__} stages the "
            "state in its own way"
        )


def _require_saver_processes() -> None:
    if not operating_system.has_saver_processes():
        raise SaverProcessError(
            f"a save in a process needs Linux, this is {sys.platform}: "
            "pass async_checkpointer_type=AsyncCheckpointerType.THREAD"
        )


def save_staged(
    staged: Future[dict[str, Any]] | dict[str, Any],
    call: SaveCall,
    planner: SavePlanner | None,
    *,
    in_process: bool,
) -> Future[Metadata]:
    """Save a copy of a state in the background, or the future of a copy. Collective.

    The copy must not change until the save's future is done.
    """
    call = replace(call, no_dist=resolve_no_dist(call.no_dist, "save"))
    team = _background_team(call, in_process=in_process)
    with team.preparing():
        if not isinstance(staged, Future):
            check_state_dict(staged)
        job = _prepare_job(team, call, planner_for(planner, None), None, in_process=in_process)
    return job(
        lambda: read_stateful(staged.result() if isinstance(staged, Future) else staged), None
    )


def _background_team(call: SaveCall, *, in_process: bool) -> Team:
    """The team of a background save that is called now."""
    team = call.open_team("async_save" if in_process else "save", background=True)
    if not call.no_dist:
        # The save begins after the copy; from here on the others see if this rank ends meanwhile.
        announce(call.process_group, call.coordinator_rank)
    return team


def _prepare_job(
    team: Team,
    call: SaveCall,
    planner: SavePlanner,
    progress: Callable[[Progress], None] | None,
    *,
    in_process: bool,
) -> Callable[[State, UnstagedTensors | None], Future[Metadata]]:
    """A function that starts the save of a staged state, in a thread or in the rank's process."""
    writer, reset, together = call.writer(), call.reset(), call.use_collectives
    if in_process:
        _require_saver_processes()
        how = pickle_for_process(writer, planner)
        to_set = call.checkpoint_id if reset else None
        return lambda state, _: save_in_process(Job(team, state, how, to_set, together, progress))
    request = partial(SaveRequest, use_collectives=together, progress=progress, reset=reset)
    return lambda state, unstaged: _save_in_thread(
        Save(team, request(state, writer, planner, unstaged=unstaged))
    )


class _Staging:
    """The copy of a state: done, failed, or under way."""

    def __init__(
        self,
        state_dict: dict[str, Any],
        stager: AsyncStager | None,
        *,
        shared: bool,
        budget_bytes: int | None,
    ) -> None:
        """Copy, or let the stager begin to. An exception is kept for the save."""
        self.unstaged: UnstagedTensors | None = None
        self._stager = stager
        self._copied: Any = None
        self._failure: Exception | None = None
        try:
            plain = read_stateful(state_dict)
            with CallEvents("stage_state_dict", {}, log_exceptions=True):
                if budget_bytes is not None:
                    self._copied, self.unstaged = stage_within_budget(plain, KEPT, budget_bytes)
                elif stager is None:
                    self._copied = stage_state(plain, KEPT_SHARED if shared else KEPT)
                else:
                    self._copied = stager.stage(plain)
        except Exception as error:  # noqa: BLE001 - raised by the save, so that all ranks receive it
            self._failure = error

    def state(self) -> dict[str, Any]:
        """The copy, once it is made; raises the error that prevented it."""
        if self._failure is not None:
            raise self._failure
        state: dict[str, Any] = (
            self._copied.result() if isinstance(self._copied, Future) else self._copied
        )
        return state

    def response(self, uploading: Future[Metadata]) -> Future[Metadata] | AsyncSaveResponse:
        """The result of `async_save`."""
        stager, later = self._stager, self._copied
        holder: Any = stager
        if holds_copy(holder):
            holder.hold_for(uploading)
        if isinstance(later, Future):
            # In torch's type the save returns nothing; ours returns the metadata, as `save` does.
            return AsyncSaveResponse(wrap_future(later), cast(Any, uploading))
        if stager is not None and self._failure is None and stager.should_synchronize_after_execute:
            stager.synchronize_staging()
        if self.unstaged is not None:
            start = time.perf_counter()
            self.unstaged.wait()
            logger.info(
                "async_save waited %.3f s until %.3f MB were written that did not fit into "
                "staging_budget", time.perf_counter() - start, self.unstaged.nbytes / 1e6,
            )  # fmt: skip
        return uploading


def _own_stager(writer: StorageWriter | None) -> AsyncStager | None:
    """The writer, if it stages in its own way."""
    own: Any = writer
    if stages_at_will(own) and not own.must_stage():
        return None
    return own if isinstance(own, AsyncStager) else None


def _skip_stage(writer: Any) -> None:
    """Prepare the writer for a state that is copied without its `stage`."""
    if stages_at_will(writer):
        writer.skip_stage()


def _save_in_thread(save: Save) -> Future[Metadata]:
    uploading: Future[Metadata] = Future()
    # It has begun: it has its place among the group's operations.
    uploading.set_running_or_notify_cancel()
    # The save holds the copy of the state: nothing may when the future is done, or a save that is
    # begun at once would need memory for another copy.
    only = [save]
    unstaged = save.request.unstaged

    def run() -> None:
        try:
            metadata = _run_and_forget(only)
        except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
            forget_locals(error)
            forget_frames(error)
            uploading.set_exception(error)
        else:
            uploading.set_result(metadata)
        finally:
            if unstaged is not None:
                unstaged.end()

    pool = ThreadPoolExecutor(1, thread_name_prefix="dcp-async-save")
    pool.submit(run)
    # The thread ends with its only job.
    pool.shutdown(wait=False)
    return uploading


def _run_and_forget(only: list[Save]) -> Metadata:
    """Run the one save of the list; afterwards nothing refers to it."""
    save = only.pop()
    arguments = {"storage_writer": save.writer, "process_group": save.team.group}
    try:
        with CallEvents("save", arguments, log_exceptions=True):
            return save.run()
    finally:
        vars(save).clear()  # a function in a frame of an error may still hold it
