"""One rank's part in one load: find the checkpoint -> plan reads -> read into the targets.

Theory of operation
-------------------

A load is two steps, "plan" and "read". All ranks take a step or none does (`coordinate`): each does
its part, each learns whether all have succeeded, and where one failed every rank raises the same
error. Ranks send each other facts about their plans (`Planned`); the plans themselves go to the
coordinator only where a planner or a reader of the user's wants to see them all. Where the ranks
read together (`shared_reading`), there are more steps between the two: "locate" and "located" for
entries of torch's, "share" and "connect".

One load goes through these modules from top to bottom:

    verbs.load             arguments -> LoadRequest, and the team of ranks
    plan  load_source      find: lease, metadata, the id of the save
          planners         plan reads: state dict x index -> read items, as columns
          load_source      accept: the reader's say; open the files
          compare_ranks    on the coordinator: did all ranks find the same save?
          shared_reading   on the coordinator: do they read together, and who reads what?
    read  io.entry_places  resolve: items -> the place of their bytes in which file
          storages.load_into_targets
                           judge: decode values, read numbers, compare wrappers
          planners         commit: values and numbers go into the state dict
          planners         targets: the tensors to fill, as a table
          io.copy_plan     plan copies: items x memory of the targets -> copies, as columns
          io.read_copies   execute: bytes of files -> memory of the targets, checked

Each calls downwards only: a room gets values from the rooms above it, and no functions to call
back. What a planner can do is asked once, when the load begins (`planners.load_capabilities`).
Only the team calls this module back, to run a rank's part of a step.

The order of the hooks is torch's, since planners and readers of users count on it: read_metadata,
set_up_planner, set_up_storage_reader, create_local_plan, prepare_local_plan, [create_global_plan,
prepare_global_plan,] finish_plan, read_data.

Rules:

- Before any rank's state changes, all ranks know that everything fits. Keys, shapes and dtypes are
  compared in "plan". Some things are known only once they are read: values, numbers that are stored
  as tensors, entries of torch that may be wrappers. If any rank has one of these (`may_misfit`),
  the ranks agree twice in "read": once when each has judged, and once when each has filled.
- A load reads one save. Another save may replace the checkpoint at any moment, and its sweep may
  remove the files. So a rank opens all its files in "plan", and a descriptor outlives the sweep. If
  a rank opens them too late, or ranks found different saves, the step fails with
  CheckpointReplacedError and the load begins again, for at most RETRY_S, if the planner allows it;
  the ranks then hold a lease, which keeps the next save from committing while they open files.

A load writes nothing to the storage. If a rank dies or a step fails in "plan", state dicts are
unchanged, except that a planner may have given memory to meta tensors. In "read", after all ranks
have judged, targets may be left partly filled: only by damaged files, failing disks and deaths.

Assumes: the state dict does not change while it is loaded; every rank calls with the same options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader

from pytest_dcp._engine.coordinate import CoordinationError, PeerAborted, StepError, Team
from pytest_dcp._engine.coordinate.byte_exchange import ByteExchange
from pytest_dcp._engine.io.progress_observer import Observer, Progress, observe_with
from pytest_dcp._engine.plan.hooks import require_plan
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.plan.per_rank import ranks_known
from pytest_dcp._engine.planners.load_capabilities import (
    ask_load_planner,
    idle_renames_of,
    numbers_of,
    report_of,
    wrappers_of,
)
from pytest_dcp._engine.verbs.call_events import CallEvents
from pytest_dcp._engine.verbs.compare_ranks import Found, Planned, check_together
from pytest_dcp._engine.verbs.load_source import LoadSource
from pytest_dcp._engine.verbs.phase_timing import Phases
from pytest_dcp._engine.verbs.shared_reading import (
    Deal,
    Offer,
    Read,
    agree_on_sharing,
    divide_entries,
    make_deals,
)
from pytest_dcp._engine.verbs.wire_classes import allows_pickles
from pytest_dcp.errors import CheckpointReplacedError
from pytest_dcp.tracebacks import warn_caller

RETRY_S = 120.0
"""How long a load tries again while other saves replace the checkpoint; one retry is enough where
the storage has leases."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load, into what: the arguments of one load on this rank."""

    state: Callable[[], dict[str, Any]]
    """Gives the state dict; asked in the first step, so that its failure reaches every rank."""
    reader: StorageReader
    planner: LoadPlanner
    progress: Callable[[Progress], None] | None = None
    """Called now and then with this rank's progress."""
    read: Read = "auto"
    """Whether ranks read together: see `shared_reading`."""


@dataclass(frozen=True, slots=True)
class _RankPlan:
    """This rank's plan, once it has planned."""

    plan: LoadPlan
    may_misfit: bool
    """Whether any rank has values to judge before it fills."""
    shares_reads: bool
    """Whether the ranks may read together."""


class Load:
    """One rank's part in one load."""

    def __init__(self, team: Team, request: LoadRequest) -> None:
        self.team = team
        self.request = request
        self.planner = request.planner
        self.capabilities = ask_load_planner(request.planner)
        self.source = LoadSource(request.reader)
        team.pickles = allows_pickles(request.planner, request.reader)
        self.state_dict: dict[str, Any] = {}
        self.phases = Phases()
        self.all_open = False
        """Whether every file that this rank needs is open."""
        self.found: list[Found] | None = None
        """On the coordinator: the ranks' results of this try; None if a rank failed."""
        self.found_before: list[Found] | None = None
        self.first_conflict_s: float | None = None
        self.final: LoadPlan | None = None
        """The plan to carry out, once the planner has finished it."""
        self.judged = False
        """Whether everything that may not fit has been judged."""

    def run(self) -> LoadReport:
        """Load, with the result and errors of `load`."""
        with self.team.wait_for_turn() as team:
            watcher = Observer("load", team.rank, check=team.check, progress=self.request.progress)
            with observe_with(watcher), ranks_known(*team.view):
                self._load_with_retries(team)
            report = self.source.with_byte_counts(report_of(self.planner))
            more = f", {report.bytes_read} bytes read, {report.bytes_verified} verified"
            self.phases.log("loaded", self.source.where, watcher.done_bytes, team.rank, more)
        return report

    def _load_with_retries(self, team: Team) -> None:
        """Plan and read; repeat while other saves replace the checkpoint meanwhile.

        From the second try on, ranks hold a lease while they plan and open their files, so this
        try succeeds if the storage has leases and enough descriptors. A planner that cannot be
        repeated has only one try, which takes the lease at once. Without leases each try must have
        seen another save.
        """
        planner: Any = self.planner
        leased = not self.capabilities.may_repeat(has_read=False)
        while True:
            try:
                self._plan_and_read(team, leased=leased)
            except StepError as error:
                if not self._may_repeat(error):
                    raise
                if not team.broadcast("retry", self._may_try_again):
                    raise
                planner.begin_again()
                leased = True
            else:
                return
            finally:
                self.source.close()

    def _plan_and_read(self, team: Team, *, leased: bool) -> None:
        """One try, from top to bottom."""
        self.final, self.judged = None, False
        with ExitStack() as lease:
            with self.phases.phase("plan", planning=True):
                mine = self._plan_together(team, lease if leased else None)
            if self.all_open:
                lease.close()
            with self.phases.phase("read"), ExitStack() as exchange:
                if mine.shares_reads:
                    self._share_reads(team, mine.plan, exchange)
                if mine.may_misfit:
                    # No rank's state changes before all data that any rank reads is known to fit.
                    team.agree("read", lambda: self._judge(mine.plan))
                team.agree("read", lambda: self._fill(mine.plan))

    # ---- plan

    def _plan_together(self, team: Team, lease: ExitStack | None) -> _RankPlan:
        """This rank's plan, after all ranks have planned and the coordinator has compared them."""
        alone = self.source.plans_alone and self.capabilities.plans_alone
        plans: list[LoadPlan] = []

        def plan() -> Planned:
            save_id, local = self._plan_alone(team, lease)
            plans.append(local)
            others = bool(numbers_of(self.planner) or wrappers_of(self.planner))
            return Planned(
                None if alone else local,
                self.source.found_in(save_id),
                idle_renames_of(self.planner),
                self.source.may_misfit(local, takes_others=others),
                self.source.wish(self.request.read, team.size),
            )

        if alone:
            facts = team.all_reduce("plan", plan, self._compare)
            return _RankPlan(plans[0], *facts)
        return _RankPlan(*team.reduce_scatter("plan", plan, self._make_global_plan))

    def _plan_alone(self, team: Team, lease: ExitStack | None) -> tuple[str | None, LoadPlan]:
        """The id of the save that this rank has found, and its local plan; its files are open."""
        self.state_dict = self.request.state()
        with self._events("local_step"):
            found = self.source.find(team.rank, lease)
            self.planner.set_up_planner(self.state_dict, found.metadata, team.is_coordinator)
            self.source.set_up(found, team)
            local_plan = require_plan(
                self.planner.create_local_plan(), LoadPlan, "create_local_plan"
            )
            plan, self.all_open = self.source.prepare_local_plan(local_plan)
        return found.save_id, plan

    def _events(self, step: str) -> CallEvents:
        """Logs a step, by torch's name of it."""
        arguments = {"checkpoint_id": self.source.place, "process_group": self.team.group}
        return CallEvents(step, arguments)

    def _compare(self, rank_values: Sequence[Planned]) -> tuple[bool, bool]:
        """On the coordinator, once the ranks' facts agree: whether any rank may meet a misfit, and
        whether they read together."""
        with self._events("global_step"):
            self.found = [one.found for one in rank_values]
            may_misfit = check_together(rank_values)
            return may_misfit, agree_on_sharing([one.sharing for one in rank_values])

    def _make_global_plan(self, rank_values: list[Planned]) -> list[tuple[LoadPlan, bool, bool]]:
        """On the coordinator: each rank's plan, by the hooks that see the plans of all."""
        facts = self._compare(rank_values)
        plans = [one.plan for one in rank_values if one.plan is not None]
        global_plan = self.planner.create_global_plan(plans)
        return [(plan, *facts) for plan in self.request.reader.prepare_global_plan(global_plan)]

    # ---- read

    def _share_reads(self, team: Team, plan: LoadPlan, exchange: ExitStack) -> None:
        """Find out what this rank reads for others; `exchange` closes the connections to them."""
        channel = exchange.enter_context(closing(team.open_byte_exchange()))
        insist = self.request.read == "shared"
        located = self._locate(team, plan)

        def offer() -> Offer:
            wants = self.source.offer(
                self._finish(plan), self.planner, self.capabilities, located, insist=insist
            )
            return Offer(wants, channel.token)

        deal = team.reduce_scatter("share", offer, partial(make_deals, insist=insist))
        if deal is None or not self._connect(team, channel, deal, insist=insist):
            exchange.close()
        else:
            self.source.share(team.rank, deal.share, channel)

    def _locate(self, team: Team, plan: LoadPlan) -> list[Any]:
        """Where the data is in entries that must be parsed, which takes small reads: each rank
        looks into its part of them."""
        lost = team.all_gather("locate", lambda: self.source.list_unlocated(self._finish(plan)))
        if not any(map(len, lost)):
            return []
        mine = divide_entries(lost, team.rank)
        return team.all_gather("located", lambda: self.source.locate(mine))

    def _connect(self, team: Team, channel: ByteExchange, deal: Deal, *, insist: bool) -> bool:
        """Connect to the ranks that get bytes from this one; whether that worked on all ranks.

        insist: raises where it did not.
        """

        def connect() -> bool:
            try:
                channel.connect(deal.tokens)
            except CoordinationError as error:
                if insist or isinstance(error, PeerAborted):
                    raise
                warn_caller(f"each rank reads what it wants itself: {error}")
                return False
            return True

        return team.all_reduce("connect", connect, all)

    def _finish(self, plan: LoadPlan) -> LoadPlan:
        """The plan to carry out; the planner finishes it once."""
        self.final = self.final or self.planner.finish_plan(plan)
        return self.final

    def _judge(self, plan: LoadPlan) -> None:
        self.source.prepare(self._finish(plan), self.planner, self.capabilities)
        self.judged = True

    def _fill(self, plan: LoadPlan) -> None:
        final = self._finish(plan)
        with self._events("read_data"):
            if not self.judged:
                self.source.prepare(final, self.planner, self.capabilities)
            self.source.read(final, self.planner)
        self.final = None

    # ---- again

    def _may_repeat(self, error: StepError) -> bool:
        """Whether another try may succeed, and does no harm. The same on every rank."""
        causes = [cause for cause, _ in error.failures.values()]
        has_read = error.step != "plan"
        return self.capabilities.may_repeat(has_read=has_read) and all(
            isinstance(cause, CheckpointReplacedError) for cause in causes
        )

    def _may_try_again(self) -> bool:
        """On the coordinator: whether there is time, and the last try has seen a new save."""
        now_s = time.monotonic()
        self.first_conflict_s = self.first_conflict_s or now_s
        moves = self.found is None or self.found != self.found_before
        self.found, self.found_before = None, self.found
        return moves and now_s - self.first_conflict_s < RETRY_S
