"""checkpoint -> plan -> reads -> state dict.

Two steps, each of which all ranks take or none: "plan", in which each rank reads the metadata and
finds what it needs, and "read". Ranks send nothing but whether they succeeded, unless a planner or
a storage of the user's wants the plans of all.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from pytest_dcp._engine.coordinate import StepError, Team, ranks_text, team_of
from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.io.checked_ranges import Verify
from pytest_dcp._engine.io.progress_observer import Observer, Progress, observe_with
from pytest_dcp._engine.plan.columns import has_values
from pytest_dcp._engine.plan.hooks import kept_whole, require_plan
from pytest_dcp._engine.plan.match import LoadReport
from pytest_dcp._engine.plan.per_rank import ranks_known
from pytest_dcp._engine.plan.select import Rename, Selection
from pytest_dcp._engine.planners.empty_state_dict import _EmptyStateDictLoadPlanner
from pytest_dcp._engine.planners.load_planner import DefaultLoadPlanner
from pytest_dcp._engine.storages.folder_reader import FileSystemReader, checked_verify
from pytest_dcp._engine.storages.local_filesystem import save_of
from pytest_dcp._engine.verbs.phase_timing import Phases
from pytest_dcp._engine.verbs.torch_arguments import (
    accepts_parameter,
    alone,
    check_state_dict,
    is_stateful,
    reader_for,
    resolve_stateful,
    second_argument,
    subject_of,
)
from pytest_dcp._engine.verbs.wire_classes import allows_pickles
from pytest_dcp.errors import CheckpointError, CheckpointMismatchError, CheckpointReplacedError
from pytest_dcp.tracebacks import drop_inner_frames


@deprecated(
    "`load_state_dict` is deprecated and will be removed in future versions. "
    "Please use `load` instead.",
    category=FutureWarning,
)
@drop_inner_frames
def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load into a state dict of tensors and values: the older form of `load`, without Stateful."""
    team = _load_team(process_group, no_dist, coordinator_rank, storage_reader, None)
    with team.preparing():
        check_state_dict(state_dict)
        storage_reader.reset()
        planner = planner or DefaultLoadPlanner()
    _Load(team, lambda: state_dict, storage_reader, planner).run()


@second_argument("storage_reader")
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    strict: bool = True,
    keys: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    weights_only: bool = True,
    verify: Verify | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> LoadReport:
    """What was missing, unexpected or converted; the state dict is filled. Collective.

    Tensors are loaded in place, in whatever layout they are; values are replaced; Stateful objects
    are given what was loaded. Meta tensors are replaced by real ones. Up to `no_dist` the
    arguments are torch's; the others are for the default planner and storage:

    strict: False leaves what the checkpoint lacks as it is, and converts any dtype to any other.
    keys: load only these flat names, or shell-style patterns of them.
    rename: from the state dict's flat names to the checkpoint's, {"mine.": "stored."}: a mapping of
        names, or of prefixes that end in a dot, or a function. An entry that finds nothing on any
        rank is refused, also without `strict`.
    weights_only: False lets values of any class be loaded, which can run code: only for
        checkpoints whose writer you trust.
    verify: "auto", "full" or "off", see FileSystemReader; None: "auto", or the given reader's.
    progress: called now and then with how far this rank has come.

    Raises CheckpointException, the same on every rank, naming each rank that failed and why: keys
    that do not fit (CheckpointMismatchError) before any byte moves, damage
    (CheckpointCorruptError) with file, entry and offset.
    """
    no_dist = alone(no_dist, "load")
    options = {} if verify is None else {"verify": verify}
    team = _load_team(process_group, no_dist, 0, storage_reader, checkpoint_id)
    with team.preparing():
        check_state_dict(state_dict)
        storage_reader = reader_for(storage_reader, checkpoint_id, **options)
        chosen = Selection([keys] if isinstance(keys, str) else keys, rename)
        planner = _planner_for(planner, chosen, strict=strict, weights_only=weights_only)
        if verify is not None:
            checked_verify(verify)

    def ordered() -> dict[str, Any]:
        return resolve_stateful({key: state_dict[key] for key in sorted(state_dict)})

    work = _Load(team, ordered, storage_reader, planner, progress=progress)
    with verify_with(storage_reader, verify):
        report = work.run()
    for key, loaded in work.state_dict.items():
        # A planner may build what it loads: then the caller had no value there.
        value: Any = state_dict.get(key)
        if is_stateful(value):
            value.load_state_dict(loaded)
        else:
            state_dict[key] = loaded
    return report


def _planner_for(
    planner: LoadPlanner | None, selection: Selection, *, strict: bool, weights_only: bool
) -> LoadPlanner:
    """The given planner, or a default one with these options, which are for it alone."""
    if planner is None:
        return DefaultLoadPlanner(
            allow_partial_load=not strict, weights_only=weights_only, selection=selection
        )
    if not strict or not weights_only or selection != Selection():
        raise ValueError(
            "strict, keys, rename and weights_only are for the default planner: give them to "
            f"your {type(planner).__name__} (DefaultLoadPlanner has allow_partial_load, selection "
            "and weights_only)"
        )
    return planner


@drop_inner_frames
def load_without_template(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    weights_only: bool = True,
) -> dict[str, Any]:
    """A state dict built from what the checkpoint holds, whole, on the CPU of every rank.

    Containers and keys are those that were saved; a PerRank is a dict of what each rank saved, by
    rank. Of a checkpoint that does not describe them (torch's, or an older one of ours) they are
    dicts and lists, and keys are strings.

    keys: only these flat names, and what is below them; None: everything.
    no_dist: this rank alone, whatever process group there is.

    Raises CheckpointException, as `load`; its cause is a CheckpointMismatchError, naming them, for
    containers and keys of other classes than Python's own, unless `weights_only` is False.
    """
    no_dist = alone(no_dist, "load")
    team = _load_team(process_group, no_dist, 0, storage_reader, checkpoint_id)
    state_dict: dict[str, Any] = {}
    with team.preparing():
        storage_reader = reader_for(storage_reader, checkpoint_id)
        planner = _EmptyStateDictLoadPlanner(
            {keys} if isinstance(keys, str) else keys, weights_only=weights_only
        )
    _Load(team, lambda: state_dict, storage_reader, planner).run()
    return planner.rebuilt()


def _load_team(
    group: dist.ProcessGroup | None,
    no_dist: bool,
    coordinator_rank: int,
    reader: StorageReader | None,
    checkpoint_id: str | os.PathLike[str] | None,
) -> Team:
    """The team of a load that is called now. Ranks may have copies in folders of their own."""
    return team_of(
        group,
        use_dist=not no_dist,
        coordinator_rank=coordinator_rank,
        operation="load",
        subject=subject_of(reader, checkpoint_id),
    )


RETRY_S = 120.0
"""How long a load tries again while other saves replace the checkpoint; one retry is enough where
the storage has leases."""

Found = tuple[str | None, str | None]
"""The id of the save that a rank found, and the folder."""


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """What a rank tells the coordinator of its plan."""

    plan: LoadPlan | None
    """None where no hook wants to see it."""
    found: Found
    idle_renames: Mapping[str, str]
    """Entries of `rename` that find nothing on this rank, and why."""
    may_misfit: bool
    """Whether it has something to read that is not known to fit before it is read."""


record(Planned)


class _Load:
    """One rank's part in one load."""

    def __init__(
        self,
        team: Team,
        state: Callable[[], dict[str, Any]],
        storage_reader: StorageReader,
        planner: LoadPlanner,
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.team = team
        self.state = state
        """Gives the state dict; asked in the first step, so that its failure reaches every rank."""
        self.state_dict: dict[str, Any] = {}
        self.reader = storage_reader
        self.planner = planner
        team.pickles = allows_pickles(planner, storage_reader)
        self.progress = progress
        self.phases = Phases()
        self.save_id: str | None = None
        self.all_open = False
        """Whether every file that this rank needs is open."""
        self.found: list[Found] | None = None
        """On the coordinator: what the ranks of this try have found; None where one failed."""
        self.found_before: list[Found] | None = None
        self.first_conflict_s: float | None = None
        self.final: LoadPlan | None = None
        """The plan to carry out, once the planner has finished it."""

    def run(self) -> LoadReport:
        """Load; what `load` returns and raises."""
        with self.team.wait_for_turn() as team:
            watcher = Observer("load", team.rank, check=team.check, progress=self.progress)
            with observe_with(watcher), ranks_known(team.rank, team.size):
                self._until_it_stays(team)
            report = self._report()
            where = getattr(self.reader, "checkpoint_id", self.reader)
            more = f", {report.bytes_read} bytes read, {report.bytes_verified} verified"
            self.phases.log("loaded", where, watcher.done_bytes, team.rank, more)
        return report

    def _until_it_stays(self, team: Team) -> None:
        """Plan and read; again, as long as other saves replace the checkpoint meanwhile.

        Ranks that come together again hold a lease while they plan and open their files, so that
        the second try succeeds where the storage has leases and enough descriptors; so does the
        first of a planner that has only one. Elsewhere each try must have seen another save.
        """
        planner: Any = self.planner
        leased = not getattr(planner, "plans_again", False)
        while True:
            try:
                self._once(team, leased=leased)
            except StepError as error:
                if not self._may_repeat(error):
                    raise
                if not team.broadcast("retry", self._goes_on):
                    raise
                planner.begin_again()
                leased = True
            else:
                return
            finally:
                self._close_files()

    def _may_repeat(self, error: StepError) -> bool:
        """Whether a further try may succeed, and harms nothing. The same on every rank."""
        causes = [cause for cause, _ in error.failures.values()]
        allows = "repeatable" if error.step == "read" else "plans_again"
        return bool(getattr(self.planner, allows, False)) and all(
            isinstance(cause, CheckpointReplacedError) for cause in causes
        )

    def _goes_on(self) -> bool:
        """On the coordinator: whether there is time, and the last try has seen something new."""
        now_s = time.monotonic()
        self.first_conflict_s = self.first_conflict_s or now_s
        moves = self.found is None or self.found != self.found_before
        self.found, self.found_before = None, self.found
        return moves and now_s - self.first_conflict_s < RETRY_S

    def _once(self, team: Team, *, leased: bool) -> None:
        self.final = None
        with ExitStack() as lease:
            with self.phases.phase("plan", planning=True):
                plan, may_misfit = self._planned(team, lease if leased else None)
            if self.all_open:
                lease.close()
            with self.phases.phase("read"):
                if may_misfit:
                    # No rank's state changes before all that any rank reads is known to fit.
                    team.agree("read", lambda: self._prepare(plan))
                team.agree("read", lambda: self._read(plan))

    def _planned(self, team: Team, lease: ExitStack | None) -> tuple[LoadPlan, bool]:
        """This rank's plan, and whether any rank has something to judge before it fills."""
        plans: list[LoadPlan] = []

        def plan() -> Planned:
            if lease is not None and isinstance(self.reader, FileSystemReader):
                lease.enter_context(self.reader.leased(team.rank))
            if isinstance(self.reader, FileSystemReader):
                self.reader.keep_files()
            plans.append(self._plan(team))
            self._open_files(plans[0])
            idle: dict[str, str] = getattr(self.planner, "idle_renames", {})
            where = getattr(self.reader, "checkpoint_id", None)
            found = self.save_id, None if where is None else os.fspath(where)
            mine = None if self._plans_alone() else plans[0]
            return Planned(mine, found, idle, self._may_misfit(plans[0]))

        if not self._plans_alone():
            return team.reduce_scatter("plan", plan, self._join)
        may_misfit = team.all_reduce("plan", plan, self._check)
        return plans[0], may_misfit

    def _may_misfit(self, plan: LoadPlan) -> bool:
        reader = self.reader
        if not isinstance(reader, FileSystemReader) or not reader.prepares():
            return False
        # Of torch's entries only the files tell which are wrappers of other tensors.
        foreign = not reader.has_manifest
        return foreign or bool(getattr(self.planner, "takes_numbers", ())) or has_values(plan.items)

    def _open_files(self, plan: LoadPlan) -> None:
        """From here on the plan can be carried out, whatever other saves do."""
        reader = self.reader
        self.all_open = isinstance(reader, FileSystemReader) and reader.open_files(plan)

    def _close_files(self) -> None:
        if isinstance(self.reader, FileSystemReader):
            self.reader.close_files()

    def _check(self, said: Sequence[Planned]) -> bool:
        self.found = [one.found for one in said]
        return _check_together(said)

    def _plans_alone(self) -> bool:
        """Whether no hook wants to see the plans of all ranks."""
        reader = type(self.reader).prepare_global_plan is FileSystemReader.prepare_global_plan
        return reader and bool(getattr(self.planner, "plans_alone", False))

    def _plan(self, team: Team) -> LoadPlan:
        self.state_dict = self.state()
        metadata, together = self._metadata(team)
        # torch's ranks have an id each when they save on their own; ours have one together.
        told = together or getattr(self.reader, "has_manifest", False)
        self.save_id = save_of(metadata.storage_meta) if told else None
        self.planner.set_up_planner(self.state_dict, metadata, team.is_coordinator)
        if accepts_parameter(self.reader.set_up_storage_reader, "kwargs"):
            self.reader.set_up_storage_reader(
                metadata, team.is_coordinator, rank=team.rank, use_collectives=together
            )
        else:
            self.reader.set_up_storage_reader(metadata, team.is_coordinator)
        asked = require_plan(self.planner.create_local_plan(), LoadPlan, "create_local_plan")
        prepared = self.reader.prepare_local_plan(asked)
        return kept_whole(asked, prepared, LoadPlan, "the storage's prepare_local_plan")

    def _join(self, said: list[Planned]) -> list[tuple[LoadPlan, bool]]:
        may_misfit = self._check(said)
        plans = [one.plan for one in said if one.plan is not None]
        joined = self.reader.prepare_global_plan(self.planner.create_global_plan(plans))
        return [(plan, may_misfit) for plan in joined]

    def _metadata(self, team: Team) -> tuple[Metadata, bool]:
        """The metadata of the whole, or this rank's own, and whether it is the whole's."""
        try:
            return self.reader.read_metadata(), True
        except Exception as whole:
            # A storage of the user's may say in any way that there is none; ours says it so.
            ours = isinstance(self.reader, FileSystemReader)
            gone = isinstance(whole, FileNotFoundError) if ours else True
            if not gone or not accepts_parameter(self.reader.read_metadata, "rank", "kwargs"):
                raise
            try:
                return self.reader.read_metadata(rank=team.rank), False
            except FileNotFoundError as own:
                raise CheckpointError(
                    f"no checkpoint in {getattr(self.reader, 'checkpoint_id', self.reader)}: "
                    f"it has neither metadata for all ranks ({whole}) nor for rank {team.rank} "
                    f"alone ({own})"
                ) from whole

    def _prepare(self, plan: LoadPlan) -> None:
        self.final = self.planner.finish_plan(plan)
        if isinstance(self.reader, FileSystemReader) and self.reader.prepares():
            self.reader.prepare_data(self.final, self.planner)

    def _read(self, plan: LoadPlan) -> None:
        final, self.final = self.final or self.planner.finish_plan(plan), None
        self.reader.read_data(final, self.planner).wait()

    def _report(self) -> LoadReport:
        report = getattr(self.planner, "report", None)
        if not isinstance(report, LoadReport):
            report = LoadReport()
        if not isinstance(self.reader, FileSystemReader):
            return report
        filled = self.reader.filled
        return dataclasses.replace(
            report,
            bytes_needed=filled.bytes_needed,
            bytes_read=filled.bytes_read,
            bytes_verified=filled.bytes_verified,
        )


def _check_together(said: Sequence[Planned]) -> bool:
    """Raise what only all ranks together show to be wrong; whether any rank may meet a misfit."""
    check_one_save([one.found for one in said])
    idle = [one.idle_renames for one in said]
    useless = set(idle[0]).intersection(*idle[1:])
    if useless:
        raise CheckpointMismatchError(
            "\n".join(reason for entry, reason in idle[0].items() if entry in useless)
        )
    return any(one.may_misfit for one in said)


def check_one_save(found: Sequence[Found]) -> None:
    """Raise CheckpointReplacedError unless all ranks have found the same save.

    They may have looked in different folders: copies of one save may be there.
    """
    saves, folders = [save for save, _ in found], [folder for _, folder in found]
    if len(set(saves)) == 1:
        return
    if len(set(folders)) > 1:
        raise CheckpointReplacedError(
            f"the ranks found different saves, in different folders ({_by_rank(folders)}): every "
            "rank must give the same checkpoint_id, and call the group's saves and loads in the "
            "same order"
        )
    raise CheckpointReplacedError(
        f"the ranks found different saves in {folders[0]}: the checkpoint was replaced meanwhile; "
        f"load again ({_by_rank(saves)})"
    )


def _by_rank(values: Sequence[str | None]) -> str:
    """`rank 2: a, ranks 0-1: b`; at most three values."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    rarest = sorted(ranks.items(), key=lambda item: len(item[1]))
    named = [f"{ranks_text(those)}: {value}" for value, those in rarest[:3]]
    return ", ".join([*named, "..."] if len(rarest) > 3 else named)


@contextmanager
def verify_with(reader: StorageReader, verify: Verify | None) -> Iterator[None]:
    """Let the reader verify so inside, where it is one of ours; then as before."""
    if verify is None or not isinstance(reader, FileSystemReader):
        yield
        return
    before, reader.verify = reader.verify, checked_verify(verify)
    try:
        yield
    finally:
        reader.verify = before
