"""A group's memory of planned saves: whole plans on its coordinator, on a rank its own part.

See `plan_exchange` for how it is used. Each group has its own memory, which ends with it, and each
coordinator in it.
"""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.index import Index, KeyTable, index_of
from pytest_dcp._engine.plan.replica_comparison import Replicas
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.verbs.save_messages import EncodedMetadata, copy_paths
from pytest_dcp._engine.verbs.wire_classes import is_known

STRUCTURES = 4
"""Global plans that a coordinator remembers, and parts of its own that a rank does: for a job that
saves its model and its optimizer in turn."""
MEMORY_BYTES = 1 << 30
"""The most that the coordinator of a group remembers: some 7 million items of all ranks together. A
larger plan is sent in full at each save."""
ANSWER_BYTES = 16 << 20
"""The largest metadata, as it is sent, that a rank remembers for each global plan."""
NAME_BYTES, PATH_BYTES = 100, 400
"""Of a name in memory, and of a path in the state dict with its key, roughly."""
UNNAMED = bytes(8)
"""Instead of the name of an answer that the coordinator does not remember."""

Settings = tuple[object, ...]
"""The options of a planner that a global plan depends on."""


@dataclass(frozen=True, slots=True, eq=False)
class JoinedPlans:
    """All ranks' local plans, and the global plans that our planner made of them."""

    local: list[SavePlan]
    plans: list[SavePlan]
    """The global plan of each rank, before the storage has prepared it."""
    index: Index
    paths: Mapping[str, Any] | None
    """The metadata's planner_data."""
    replicas: Replicas | None

    @classmethod
    def of(
        cls,
        planner: DefaultSavePlanner,
        local: Sequence[SavePlan],
        plans: Sequence[SavePlan],
        metadata: Metadata,
    ) -> JoinedPlans:
        """The plans that the planner has just joined."""
        index, paths = index_of(metadata), copy_paths(metadata.planner_data)
        return cls(list(local), list(plans), index, paths, planner.replicas)

    def give_to(self, planner: DefaultSavePlanner) -> tuple[list[SavePlan], Metadata]:
        """The result of the planner's `create_global_plan`, and its state after that."""
        # Objects of this save's own: its caller gets them, and may change them.
        keys: Any = KeyTable(self.index)
        planner.metadata = Metadata(keys, planner_data=copy_paths(self.paths))
        planner.global_plan = list(self.plans)
        planner.replicas = self.replicas
        planner.planned = [plan.items for plan in self.local]
        return planner.global_plan, planner.metadata

    def kept_bytes(self) -> int:
        """The memory that it takes, roughly."""
        tables = [WriteItems.of(plan.items) for plan in (*self.local, *self.plans)]
        names = {id(fqns): len(fqns) for fqns in (self.index.fqns, *(t.fqns for t in tables))}
        paths = {id(data): len(data) for data in (p.planner_data for p in self.local) if data}
        arrays = [getattr(self.index, name) for name in Index.column_names()]
        arrays += [getattr(table, name) for table in tables for name in WriteItems.column_names()]
        arrays += [table.origin.rows for table in tables if table.origin is not None]
        arrays += [] if self.replicas is None else self.replicas.group
        columns: int = sum({id(array): array.nbytes for array in arrays}.values())
        return columns + NAME_BYTES * sum(names.values()) + PATH_BYTES * sum(paths.values())


def remembers_plans(planner: object, writer: object) -> bool:
    """Whether their plans may be remembered: ours, without any hook replaced, for a known storage.

    Other code may do anything with a plan that it gets.
    """
    if type(planner) is not DefaultSavePlanner or not is_known(writer):
        return False
    replaced = any(callable(getattr(DefaultSavePlanner, name, None)) for name in vars(planner))
    return planner.remember_plans and not replaced and not planner._enable_plan_caching


def settings_of(planner: DefaultSavePlanner) -> Settings:
    """The options of a planner that its global plan depends on."""
    return (
        planner.flatten_state_dict,
        planner.flatten_sharded_tensors,
        planner.dedup_save_to_lowest_rank,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """On the coordinator: the plans of all ranks."""

    name: bytes
    settings: Settings
    """Of the planner that made the global plan."""
    digests: tuple[bytes, ...]
    """Of each rank's local plan."""
    joined: JoinedPlans
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class OwnPart:
    """On a rank: its rows of a global plan."""

    name: bytes
    rows: Ints
    hint: Ints


@dataclass(slots=True)
class PlanMemory:
    """The memory of one group in this process, as a rank or as the coordinator."""

    structures: list[Structure] = field(default_factory=list)
    """The one used last comes last."""
    parts: dict[bytes, OwnPart] = field(default_factory=dict)
    """By the digest of the local plan; the one used last comes last."""
    answers: dict[bytes, EncodedMetadata] = field(default_factory=dict)
    """By the name of the global plan: a checkpoint's metadata, from which later ones differ little.
    The one used last comes last."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plans(self) -> dict[bytes, SavePlan]:
        """The local plans that are remembered, by digest."""
        with self.lock:
            return {
                digest: plan
                for structure in self.structures
                for digest, plan in zip(structure.digests, structure.joined.local, strict=True)
            }

    def find(self, digests: tuple[bytes, ...], settings: Settings) -> Structure | None:
        """The structure of exactly these plans, joined by such a planner."""
        with self.lock:
            for at, structure in enumerate(self.structures):
                if structure.digests == digests and structure.settings == settings:
                    self.structures.append(self.structures.pop(at))
                    return structure
        return None

    def keep(
        self, digests: tuple[bytes, ...], settings: Settings, joined: JoinedPlans
    ) -> Structure | None:
        """Remember the plans, and forget others to make room; None if they are too large."""
        name = secrets.token_bytes(len(UNNAMED))
        structure = Structure(name, settings, digests, joined, joined.kept_bytes())
        if structure.nbytes > MEMORY_BYTES:
            return None
        with self.lock:
            structures = [*self.structures, structure][-STRUCTURES:]
            while sum(structure.nbytes for structure in structures) > MEMORY_BYTES:
                del structures[0]
            self.structures = structures
        return structure

    def part(self, digest: bytes) -> OwnPart | None:
        """This rank's part of the answer to the plan with this digest."""
        with self.lock:
            return self.parts.get(digest)

    def keep_part(self, digest: bytes, part: OwnPart) -> None:
        """Remember the part."""
        with self.lock:
            self.parts.pop(digest, None)
            self.parts[digest] = part
            while len(self.parts) > STRUCTURES:
                del self.parts[next(iter(self.parts))]

    def answer(self, name: bytes) -> EncodedMetadata | None:
        """The metadata that both sides may refer to."""
        with self.lock:
            return self.answers.get(name)

    def keep_answer(self, name: bytes, answer: EncodedMetadata) -> None:
        """Remember the metadata, unless it is too large."""
        if len(answer.manifest) > ANSWER_BYTES:
            return
        # A copy: the caller of the save may change what it gets.
        paths, *values = answer.python_values
        answer = replace(answer, python_values=(copy_paths(paths), *values))
        with self.lock:
            self.answers.pop(name, None)
            self.answers[name] = answer
            while len(self.answers) > STRUCTURES:
                del self.answers[next(iter(self.answers))]


_memories: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, PlanMemory]] = (
    weakref.WeakKeyDictionary()
)
"""By group, then by coordinator."""
_making = threading.Lock()


def memory_of(group: dist.ProcessGroup, coordinator_rank: int) -> PlanMemory:
    """This process's memory of a group and its coordinator."""
    with _making:
        by_coordinator = _memories.setdefault(group, {})
        return by_coordinator.setdefault(coordinator_rank, PlanMemory())


def _forget_in_child() -> None:
    global _making
    _making = threading.Lock()
    _memories.clear()


operating_system.call_in_forked_children(_forget_in_child)
