"""state dict -> plan -> storage -> commit.

Two steps, each taken by all ranks or by none: in "plan" the coordinator joins the ranks' plans; in
"write" each rank writes its part and the coordinator commits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from typing_extensions import deprecated

from pytest_dcp._engine.coordinate import Team
from pytest_dcp._engine.io.progress_observer import Observer, Progress, observe_with
from pytest_dcp._engine.plan.hooks import require_complete, require_plan, with_list
from pytest_dcp._engine.plan.per_rank import ranks_known
from pytest_dcp._engine.plan.replica_comparison import ReplicaCheck, Sums
from pytest_dcp._engine.plan.storage_capabilities import cleans_up, names_saves, place_of
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.staging.unstaged_tensors import written_first
from pytest_dcp._engine.storages.folder_cleanup import discard_files
from pytest_dcp._engine.verbs.call_events import CallEvents
from pytest_dcp._engine.verbs.fake_group import fake_group_of, plan_in_fake_world
from pytest_dcp._engine.verbs.phase_timing import Phases
from pytest_dcp._engine.verbs.plan_exchange import (
    Offer,
    PlanAnswer,
    PlanExchange,
    SendPlan,
    exchange_of,
)
from pytest_dcp._engine.verbs.replica_check import Comparison, Dispute
from pytest_dcp._engine.verbs.save_messages import (
    compress_plan,
    compress_results,
    expand_results,
)
from pytest_dcp._engine.verbs.save_request import SaveCall, SaveRequest
from pytest_dcp._engine.verbs.torch_arguments import (
    accepts_parameter,
    allow_positional_storage,
    check_planner,
    check_state_dict,
    resolve_no_dist,
    resolve_stateful,
)
from pytest_dcp._engine.verbs.wire_classes import allows_pickles
from pytest_dcp.tracebacks import drop_inner_frames, warn_caller


@deprecated(
    "`save_state_dict` is deprecated and will be removed in future versions."
    "Please use `save` instead.",
    category=FutureWarning,
)
@drop_inner_frames
def save_state_dict(
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save a state dict of tensors and values: the older form of `save`, without Stateful."""
    team = SaveCall(
        storage_writer,
        process_group=process_group,
        no_dist=no_dist,
        coordinator_rank=coordinator_rank,
    ).open_team()
    with team.preparing():
        check_state_dict(state_dict)
    request = SaveRequest(
        lambda: state_dict,
        storage_writer,
        planner or DefaultSavePlanner(),
        reset=storage_writer.reset,
    )
    return Save(team, request).run()


@allow_positional_storage("storage_writer")
def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    progress: Callable[[Progress], None] | None = None,
    replicas: ReplicaCheck | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Metadata:
    """Save the ranks' state dicts as one checkpoint; return its metadata. Collective.

    state_dict: nested dicts and lists of tensors (plain, DTensor, ShardedTensor) and values;
        Stateful objects are asked for their state_dict.
    checkpoint_id: the folder; a given storage is set to it.
    process_group: whose ranks save together; None: the default group. no_dist: this rank alone.
    use_collectives: False lets each rank plan and commit its own part; such a checkpoint can be
        loaded only by the same number of ranks in the same layout. Ranks commit once all have
        written; a rank that fails just then leaves parts of two saves, which every load refuses.
    progress: called now and then with this rank's progress.
    replicas: of data that several ranks hold one copy is saved; this says which copies to compare:
        "sample" (the default, None: every Python value and a small sample of the tensors), "check"
        (everything) or "off". For the default planner; DefaultSavePlanner has the same argument.
        Copies that differ raise ReplicaMismatchError; PerRank saves a value of each rank.
    storage_options: for the file system of a URL, such as {"endpoint_url": ...}.

    In a fake world (torch's FakeProcessGroup) the save is planned for all ranks, as
    `pytest_dcp.simulate` plans it, and nothing is written.

    Raises CheckpointException, the same on every rank, naming each rank that failed and why. The
    folder then still has its earlier checkpoint, whole.

    >>> import torch
    >>> from pytest_dcp.checkpoint import load, save
    >>> model, optimizer = {"weight": torch.ones(2, 2)}, {"lr": 0.1}
    >>> metadata = save({"model": model, "optimizer": optimizer}, checkpoint_id="step-10")
    >>> metadata.state_dict_metadata["model.weight"].size
    torch.Size([2, 2])
    """
    call = SaveCall(
        storage_writer,
        checkpoint_id,
        process_group,
        resolve_no_dist(no_dist, "save"),
        use_collectives=use_collectives,
        storage_options=storage_options,
    )
    if (fake := fake_group_of(call)) is not None:
        check_state_dict(state_dict)
        whole = read_stateful(state_dict)
        return plan_in_fake_world(whole, fake, call.writer(), planner_for(planner, replicas))
    team = call.open_team()
    with team.preparing():
        check_state_dict(state_dict)
        request = SaveRequest(
            lambda: read_stateful(state_dict),
            call.writer(),
            planner_for(planner, replicas),
            use_collectives=use_collectives,
            progress=progress,
            reset=call.reset(),
        )
    return Save(team, request).run()


def read_stateful(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the state of each Stateful object in its place."""
    with CallEvents("_stateful_to_state_dict", {}, log_exceptions=True):
        return resolve_stateful(state_dict)


def planner_for(planner: SavePlanner | None, replicas: ReplicaCheck | None) -> SavePlanner:
    """The given planner, or a default one with this option; only the default one takes it."""
    if planner is None:
        return DefaultSavePlanner(replicas=replicas)
    check_planner(planner, "SavePlanner")
    if replicas is not None:
        raise ValueError(
            f"replicas= is for the default planner: give it to your {type(planner).__name__}"
        )
    return planner


class Save:
    """One rank's part in one save. Made where the save is called, run when its turn comes."""

    def __init__(self, team: Team, request: SaveRequest) -> None:
        self.team = team
        self.request = request
        self.writer = request.writer
        self.planner = request.planner
        team.pickles = allows_pickles(self.planner, self.writer)
        self.use_collectives = request.use_collectives
        self.reset = request.reset
        self.phases = Phases()
        self.local: SavePlan | None = None
        self.rank_plans: list[SavePlan] = []
        self.exchange = (
            exchange_of(team, self.planner, self.writer)
            if self.use_collectives
            else PlanExchange(self.planner, None, rank=0)
        )
        self.comparison = Comparison(self.planner)
        self.metadata: Metadata | None = None

    def run(self) -> Metadata:
        """Save, with the result and errors of `save`."""
        with self.team.wait_for_turn() as team:
            watcher = Observer("save", team.rank, check=team.check, progress=self.request.progress)
            first = written_first(self.request.unstaged, self.writer)
            with observe_with(watcher), ranks_known(team.rank, team.size), first:
                together = (
                    self._save_together if self.use_collectives else self._save_without_coordination
                )
                try:
                    metadata = together(team)
                except BaseException:
                    discard_files(self.writer, "save")
                    raise
            where = place_of(self.writer) or self.writer
            self.phases.log("saved", where, watcher.done_bytes, team.rank)
        return metadata

    def _save_together(self, team: Team) -> Metadata:
        with self.phases.phase("plan", planning=True):
            answer = self._agree_on_plan(team)

        # These functions hold the save and nothing of it: frames of a failure may keep them, and
        # what the save holds of the state must not be kept.
        def write() -> tuple[Any, Sums | None, bool]:
            with self.phases.phase("write"):
                plan = self.exchange.accept(answer)
                # Before the write, after which the caller may change what was not copied.
                sums = self.comparison.sums(self._local_plan(), answer.checks)
                results = compress_results(self._write(plan), plan)
                return results, sums, self.request.unstaged is None

        def commit(rank_values: list[tuple[Any, Sums | None, bool]]) -> Any:
            unchanged = all(unchanged for *_, unchanged in rank_values)
            dispute = self.comparison.dispute(
                [sums for _, sums, _ in rank_values], unchanged=unchanged
            )
            if dispute is not None:
                return dispute
            results = [
                expand_results(some, plan)
                for (some, *_), plan in zip(rank_values, self.rank_plans, strict=True)
            ]
            with self.phases.phase("commit", planning=True):
                self._finish(results)
            return (
                self.metadata
                if team.size == 1
                else self.exchange.write_metadata(self._require_metadata())
            )

        outcome = team.all_reduce("write", write, commit)
        if isinstance(outcome, Dispute):
            self.comparison.settle(team, self._local_plan(), outcome)
        if team.is_coordinator:
            return self._require_metadata()
        return self.exchange.read_metadata(outcome)

    def _agree_on_plan(self, team: Team) -> PlanAnswer:
        """The coordinator's answer to this rank's plan, of which it may know the digest only."""
        answer = team.reduce_scatter(
            "plan", lambda: self.exchange.offer(self._plan(team)), self._make_global_plan
        )
        if isinstance(answer, SendPlan):
            request = answer
            answer = team.reduce_scatter(
                "plan", lambda: self.exchange.offer_again(request), self._make_global_plan
            )
        if isinstance(answer, SendPlan):
            raise ValueError("the coordinator asked twice for the ranks' plans")  # noqa: TRY004
        return answer

    def _save_without_coordination(self, team: Team) -> Metadata:
        def write() -> Sequence[WriteResult]:
            with self.phases.phase("plan"):
                alone = [self.exchange.offer(self._plan(team))]
                plan = self.exchange.accept(cast("PlanAnswer", self._make_global_plan(alone)[0]))
            with self.phases.phase("write"):
                return self._write(plan)

        def commit() -> None:
            with self.phases.phase("commit"):
                self._finish([results])

        if names_saves(self.writer):
            # One id for the parts of one save, so that a load can tell saves apart.
            self._reset_writer()
            self.writer.set_save_id(team.broadcast("plan", self.writer.new_save_id))
        results = team.agree("write", write)
        team.agree("commit", commit)
        if names_saves(self.writer):
            # A load would find an earlier collective checkpoint first.
            team.broadcast("retire", self.writer.remove_collective_metadata)
        return self._require_metadata()

    def _plan(self, team: Team) -> SavePlan:
        """This rank's local plan."""
        self._reset_writer()
        state_dict = self.request.state()
        with self._events("local_step"):
            return self._make_local_plan(team, state_dict)

    def _make_local_plan(self, team: Team, state_dict: dict[str, Any]) -> SavePlan:
        meta = self.writer.storage_meta()
        set_up: Any = self.planner.set_up_planner
        if accepts_parameter(set_up, "storage_meta"):
            set_up(
                state_dict=state_dict,
                storage_meta=meta,
                is_coordinator=team.is_coordinator,
            )
        else:
            warn_caller(
                "The function definition for SavePlanner.set_up_planner has been updated to "
                "include the storage_meta argument. Please update your implementation to include "
                "this parameter.",
            )
            set_up(state_dict, team.is_coordinator)
        if accepts_parameter(self.writer.set_up_storage_writer, "kwargs"):
            self.writer.set_up_storage_writer(
                team.is_coordinator, rank=team.rank, use_collectives=self.use_collectives
            )
        else:
            self.writer.set_up_storage_writer(team.is_coordinator)
        local_plan = require_plan(self.planner.create_local_plan(), SavePlan, "create_local_plan")
        prepared = self.writer.prepare_local_plan(
            with_list(local_plan, self.writer.prepare_local_plan)
        )
        self.local = require_complete(
            local_plan, prepared, SavePlan, "the storage's prepare_local_plan"
        )
        return self.local

    def _events(self, step: str) -> CallEvents:
        """Logs a step, by torch's name of it."""
        where = place_of(self.writer)
        return CallEvents(step, {"checkpoint_id": where, "process_group": self.team.group})

    def _reset_writer(self) -> None:
        reset, self.reset = self.reset, None
        if reset is not None:
            reset()

    def _make_global_plan(self, offers: list[Offer]) -> Sequence[SendPlan | PlanAnswer]:
        """On the coordinator: the items that each rank writes, and the pieces that it compares.

        Or requests for plans that are not known here.
        """
        requests = self.exchange.ask_for(offers)
        if requests is not None:
            return requests
        with self._events("global_step"):
            local, joined, self.metadata = self.exchange.join()
            if cleans_up(self.writer):
                self.writer.remove_leftovers()
            self.rank_plans = self.writer.prepare_global_plan(joined)
        compressed = [
            compress_plan(plan, own) for plan, own in zip(self.rank_plans, local, strict=True)
        ]
        return self.exchange.answers(compressed, self.comparison.choose_rows(local))

    def _write(self, plan: SavePlan) -> Sequence[WriteResult]:
        with self._events("write_data"):
            # A planner that remembers plans must forget where the last save's files were.
            final = replace(self.planner.finish_plan(plan), storage_data=plan.storage_data)
            final = with_list(final, self.writer.write_data)
            future = self.writer.write_data(final, self.planner)
            future.wait()
            results: Sequence[WriteResult] = future.value()
        if self.request.unstaged is not None:
            self.request.unstaged.finish_writing()
        return results

    def _finish(self, results: list[Any]) -> None:
        with self._events("finish_checkpoint"):
            self.writer.finish(metadata=self._require_metadata(), results=results)

    def _require_metadata(self) -> Metadata:
        if self.metadata is None:
            raise ValueError("the planner's create_global_plan gave no metadata")
        return self.metadata

    def _local_plan(self) -> SavePlan:
        if self.local is None:
            raise ValueError("the storage's prepare_local_plan gave no plan")
        return self.local
