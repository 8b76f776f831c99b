"""A mesh, placements and a state -> a `Simulation` of one save, without ranks and without data.

The code that plans is the real one: the default planner flattens the state and joins the plans
(deduplication, balance, coverage), `verbs.save_messages` compresses the messages,
`format` measures entries, manifest and pickle. Made here, for all ranks at once, are only the
tables that each rank would make of its own tensors (`rank_tables`), and the places to which it
would write (`planned_files`). Tests compare both with real worlds.

No tensor's data is read, so the tensors may be on the meta device. Pure but for the clock.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.manifest_columns import encoded_length
from pytest_dcp._engine.format.metadata_pickle import pickled_length
from pytest_dcp._engine.format.metadata_trailer import ALIGNMENT, TRAILER_BYTES
from pytest_dcp._engine.format.page_table import table_bytes
from pytest_dcp._engine.format.write_results import WriteColumns, WriteResults, places_of
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp._engine.plan.index import Index, index_of
from pytest_dcp._engine.plan.replica_comparison import Checks
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.simulation.local_plans import LocalPlans, SimulatedState, make_local_plans
from pytest_dcp._engine.simulation.mesh_ranks import Mesh, MeshRanks
from pytest_dcp._engine.simulation.named_placements import PlacementLookup, Placements
from pytest_dcp._engine.simulation.planned_files import SAVE_ID, FilePlanner, FileRules
from pytest_dcp._engine.simulation.simulation import (
    CoordinatorCost,
    PlannedFile,
    RankPlan,
    Simulation,
)
from pytest_dcp._engine.simulation.step_messages import (
    StepMessages,
    later_metadata_message,
    later_plan_messages,
    metadata_message,
    plan_messages,
    write_messages,
    written_message,
)
from pytest_dcp._engine.storages.file_names import names_of_rank
from pytest_dcp._engine.storages.folder_writer import CURRENT_DCP_VERSION
from pytest_dcp._engine.verbs.plan_memory import MEMORY_BYTES, JoinedPlans
from pytest_dcp._engine.verbs.replica_check import Comparison
from pytest_dcp._engine.verbs.save_messages import CompressedPlan, compress_plan
from pytest_dcp.garbage_collection import collector_paused

ROW_BYTES = 31
"""Of a row of `plan.save` that is not its box: key, rank, kind, property, dimensions, bytes."""


def simulate(
    mesh: Mesh,
    placements: Placements,
    state: SimulatedState,
    *,
    ranks: Collection[int] = (),
    planner: DefaultSavePlanner | None = None,
    thread_count: int = 1,
    single_file_per_rank: bool = True,
    checkpoint_id: str | os.PathLike[str] = "",
) -> Simulation:
    """Plan the save that a world of this mesh would make, with its files, messages and costs.

    mesh: a number of ranks, a shape such as (512, 8) whose ranks are in row-major order, or a
        DeviceMesh of a whole world.
    placements: one list for all tensors; a dict from flat names, or patterns such as
        "layers.*.weight", to lists; or a function of name and tensor. A tensor without placements
        is a plain one, which every rank holds whole. DTensors in the state keep their own.
    state: the state dict, with the full shape of each tensor, or a function that gives each rank
        its own. Only shapes and dtypes are read: tensors may be on the meta device.
    ranks: the ranks whose items and files `Simulation.plans` lists.
    planner: a DefaultSavePlanner with other options.
    thread_count, single_file_per_rank: as of FileSystemWriter.
    checkpoint_id: the folder's name, which is in the metadata and counts with its length; nothing
        is written there.

    Raises ValueError for a mesh, placements or ranks that cannot be simulated, and PlanError as the
    save would, where the parts do not form whole tensors.

    >>> import torch
    >>> from pytest_dcp import simulate
    >>> from torch.distributed.tensor import Replicate, Shard
    >>> state = {"w": torch.empty(4096, 1024, device="meta"), "step": 3}
    >>> fsdp = simulate(1024, {"w": [Shard(0)]}, state)
    >>> fsdp.chunks, fsdp.slowest_rank, fsdp.coordinator.connections
    (1025, 0, 1023)
    >>> hsdp = simulate((2, 512), {"w": [Replicate(), Shard(0)]}, state, ranks=[600])
    >>> hsdp.chunks, len(hsdp.plans[600].local_items), int(hsdp.items.max())
    (513, 2, 1)
    """
    found, _ = plan_metadata(
        mesh,
        placements,
        state,
        ranks=ranks,
        planner=planner,
        thread_count=thread_count,
        single_file_per_rank=single_file_per_rank,
        checkpoint_id=checkpoint_id,
    )
    return found


def plan_metadata(
    mesh: Mesh,
    placements: Placements,
    state: SimulatedState,
    *,
    ranks: Collection[int] = (),
    planner: DefaultSavePlanner | None = None,
    thread_count: int = 1,
    single_file_per_rank: bool = True,
    checkpoint_id: str | os.PathLike[str] = "",
) -> tuple[Simulation, Metadata]:
    """Like `simulate`, and the checkpoint's metadata."""
    mesh_ranks = MeshRanks.of(mesh)
    listed = _check_ranks(ranks, mesh_ranks.size)
    own_planner = _check_planner(planner)
    rules = FileRules(thread_count, single_file_per_rank, checkpoint_id)
    lookup = PlacementLookup(placements, mesh_ranks)
    with collector_paused():
        local = make_local_plans(state, mesh_ranks, lookup, own_planner)
        save = _SimulatedSave(local, own_planner, rules)
        return save.simulate(listed), save.metadata


def _check_ranks(ranks: Collection[int], size: int) -> list[int]:
    strange = [rank for rank in ranks if type(rank) is not int or not 0 <= rank < size]
    if strange:
        raise ValueError(f"ranks= takes ranks from 0 to {size - 1}; got {strange[0]!r}")
    return sorted(set(ranks))


def _check_planner(planner: DefaultSavePlanner | None) -> DefaultSavePlanner:
    if planner is None:
        return DefaultSavePlanner()
    if type(planner) is not DefaultSavePlanner or planner._enable_plan_caching:
        raise ValueError(
            f"a {type(planner).__name__} cannot be simulated: a DefaultSavePlanner without plan "
            "caching can"
        )
    return planner


@dataclass(frozen=True, slots=True, eq=False)
class _Joined:
    """The coordinator's answer to the local plans."""

    plans: list[SavePlan]
    metadata: Metadata
    compressed: list[CompressedPlan | SavePlan]
    checks: list[Checks | None]
    remembered: bool
    """Whether the coordinator keeps them for later saves."""
    plan_s: float


class _WrittenRanks:
    """Sums up the files of each rank, one after the other: all at once would take gigabytes."""

    def __init__(
        self, local: LocalPlans, joined: _Joined, rules: FileRules, listed: Collection[int]
    ) -> None:
        self._local, self._joined, self._listed = local, joined, listed
        self._planner = FilePlanner(rules)
        self.file_bytes: list[int] = []
        self.items: list[int] = []
        self.files: list[int] = []
        self.messages: list[tuple[Hashable, object]] = []
        self.plans: dict[int, RankPlan] = {}
        self._values: dict[Hashable, object] = {}

    def results(self) -> Iterator[WriteResults]:
        """The write results of each rank."""
        ranks = zip(self._joined.plans, self._local.value_bytes, self._joined.checks, strict=True)
        for rank, (plan, value_bytes, checks) in enumerate(ranks):
            table = WriteItems.of(plan.items)
            columns = self._planner.plan_files(rank, table, value_bytes)
            self.file_bytes.append(int(columns.length.sum()))
            self.items.append(len(table))
            self.files.append(len(columns.files))
            key, value = written_message(columns, checks)
            self.messages.append((key, self._values.setdefault(key, value)))
            if rank in self._listed:
                self.plans[rank] = _rank_plan(rank, self._local.plans[rank], table, columns)
            yield WriteResults(table, columns)

    def forget_plans(self) -> None:
        """Keep the sums only."""
        del self._joined, self._local, self._planner


class _SimulatedSave:
    """One simulated save."""

    def __init__(self, local: LocalPlans, planner: DefaultSavePlanner, rules: FileRules) -> None:
        # A copy, since a planner remembers the save that it planned last.
        self.local, self.planner, self.rules = local, copy.copy(planner), rules
        self.metadata = Metadata({})
        """Of the checkpoint, once it is simulated."""

    def simulate(self, listed: Collection[int]) -> Simulation:
        """Plan and measure; `listed` are the ranks to list."""
        joined = self._join_plans()
        local, metadata, plan_s = self.local, joined.metadata, joined.plan_s
        self.metadata = metadata
        plan = plan_messages(
            local.plans, joined.compressed, joined.checks, local.lookalikes, self.planner
        )
        later_plan = plan
        if joined.remembered:
            later_plan = later_plan_messages(joined.compressed, joined.checks)
        held_bytes = self._held_bytes()
        held_rows = sum(len(plan.items) for plan in local.plans)
        written = _WrittenRanks(local, joined, self.rules, listed)
        index = index_of(metadata)
        catalog = self._make_catalog(metadata, index, written.results())
        # The tables of all ranks: a gigabyte or two that the rest does without.
        written.forget_plans()
        del self.local, local, joined
        manifest, pickled = encoded_length(catalog), pickled_length(catalog)
        stock = pickled + table_bytes(manifest)
        write = write_messages(written.messages, metadata_message(catalog))
        later_write = write
        if later_plan is not plan:
            later_write = write_messages(written.messages, later_metadata_message(catalog))
        steps = (plan, write)
        memory = _memory_bytes(steps, held_rows, index, catalog.places, manifest, pickled)
        return Simulation(
            held_bytes=held_bytes,
            file_bytes=np.array(written.file_bytes, dtype=np.int64),
            items=np.array(written.items, dtype=np.int64),
            files=np.array(written.files, dtype=np.int64),
            keys=len(index),
            chunks=len(index.offset),
            metadata_bytes=stock + -stock % ALIGNMENT + manifest + TRAILER_BYTES,
            steps=steps,
            later_steps=(later_plan, later_write),
            coordinator=CoordinatorCost(
                connections=len(written.items) - 1,
                memory_bytes=memory,
                network_bytes=sum(step.coordinator_bytes for step in steps),
                plan_s=plan_s,
            ),
            plans=written.plans,
        )

    def _join_plans(self) -> _Joined:
        """The coordinator's work in the step `plan` of `Save`."""
        comparison = Comparison(self.planner)
        plans, start_s = self.local.plans, time.perf_counter()
        joined, metadata = self.planner.create_global_plan(plans)
        joined = [
            replace(plan, storage_data=names_of_rank(rank, SAVE_ID))
            for rank, plan in enumerate(joined)
        ]
        compressed = [compress_plan(*pair) for pair in zip(joined, plans, strict=True)]
        checks = comparison.choose_rows(plans)
        plan_s = time.perf_counter() - start_s
        to_remember = JoinedPlans.of(self.planner, plans, joined, metadata)
        remembered = self.planner.remember_plans and to_remember.kept_bytes() <= MEMORY_BYTES
        self.planner.replicas, self.planner.planned = None, []
        return _Joined(joined, metadata, compressed, checks, remembered, plan_s)

    def _make_catalog(
        self, metadata: Metadata, index: Index, results: Iterable[Sequence[WriteResult]]
    ) -> Catalog:
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_meta = StorageMeta(checkpoint_id=self.rules.checkpoint_id, save_id=SAVE_ID)
        places = places_of(index, results)
        return Catalog(
            index, places, metadata.planner_data, metadata.storage_meta, metadata.version
        )

    def _held_bytes(self) -> Ints:
        bytes_by_class: dict[int, int] = {}
        found = []
        for plan, value_bytes in zip(self.local.plans, self.local.value_bytes, strict=True):
            table = WriteItems.of(plan.items)
            if id(table.shape) not in bytes_by_class:
                tensors = np.where(table.kind == BYTES, 0, table.size_bytes()).sum()
                bytes_by_class[id(table.shape)] = int(tensors) + sum(value_bytes.values())
            found.append(bytes_by_class[id(table.shape)])
        return np.array(found, dtype=np.int64)


def _memory_bytes(
    steps: Sequence[StepMessages],
    held_rows: int,
    index: Index,
    places: EntryPlaces,
    manifest: int,
    pickled: int,
) -> int:
    """The coordinator's memory: while it joins the plans, or while it commits."""
    plan, write = steps
    width = index.size.shape[1]
    messages = int(plan.to_coordinator.sum())
    replies = int(plan.from_coordinator.sum())
    results = int(write.to_coordinator.sum())
    chunk_bytes = 16 * width * len(index.offset)
    joining = messages + held_rows * (ROW_BYTES + 24 * width) + chunk_bytes + replies
    place_bytes: int = sum(getattr(places, name).nbytes for name in EntryPlaces.column_names())
    committing = messages + results + chunk_bytes + place_bytes + 2 * manifest + pickled
    return int(max(joining, committing))


def _rank_plan(rank: int, plan: SavePlan, table: WriteItems, written: WriteColumns) -> RankPlan:
    count = len(written.files)
    nbytes = np.bincount(written.file, weights=written.length, minlength=count).astype(np.int64)
    items = np.bincount(written.file, minlength=count)
    files = zip(written.files, nbytes.tolist(), items.tolist(), strict=True)
    return RankPlan(rank, plan.items, table, tuple(PlannedFile(*one) for one in files))
