"""The save planner: a state dict -> write items; all ranks' items -> one global plan."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.format.python_values import encode_value, plain, refusal_of
from pytest_dcp._engine.format.wrapper_entry import encode_wrapper
from pytest_dcp._engine.plan.boxes import volumes
from pytest_dcp._engine.plan.cache import PlanCache
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp._engine.plan.containers import DESCRIPTION, describe
from pytest_dcp._engine.plan.declared_parts import BOXES
from pytest_dcp._engine.plan.describe import write_items
from pytest_dcp._engine.plan.hooks import is_overridden, lists_wanted, overridden
from pytest_dcp._engine.plan.index import Index, KeyTable, copy_metadata
from pytest_dcp._engine.plan.nested import Path, as_saved, as_saved_path, flatten
from pytest_dcp._engine.plan.opaque import is_wrapper
from pytest_dcp._engine.plan.rank_paths import merge_paths
from pytest_dcp._engine.plan.replica_comparison import ReplicaCheck, Replicas
from pytest_dcp._engine.plan.save import GlobalPlan, concatenate_tables, global_plan
from pytest_dcp._engine.plan.shards import PLAIN, require_memory
from pytest_dcp._engine.planners.state_lookup import find_state_dict_object
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp.errors import PlanError
from pytest_dcp.tracebacks import warn_caller

logger = logging.getLogger(__name__)


OF_ONE_SAVE = frozenset(
    {"state_dict", "plan", "global_plan", "metadata", "offered", "replicas", "planned", "_entries"}
)
"""A planner's state for the save that it plans, or planned last."""


REPLICAS = "DCP_REPLICAS"
"""The environment variable that replaces `replicas=` for code that cannot be changed."""


def _choose_check(replicas: ReplicaCheck | None, environ: Mapping[str, str]) -> ReplicaCheck:
    """The given check, else the environment's, else a sample. Pure."""
    choice: str = environ.get(REPLICAS, "sample") if replicas is None else replicas
    for check in get_args(ReplicaCheck):
        if choice == check:
            return cast(ReplicaCheck, check)
    name = "replicas" if replicas is not None else f"{REPLICAS} in the environment"
    raise ValueError(f"{name} must be 'sample', 'check' or 'off', got {choice!r}")


class DefaultSavePlanner(SavePlanner):
    """Plans a save: flattens the state dict, removes replicas, balances bytes, checks coverage."""

    mappings: dict[str, Path]
    replica_check: ReplicaCheck = "sample"

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
        *,
        replicas: ReplicaCheck | None = None,
        remember_plans: bool = True,
    ) -> None:
        """As torch's, and:

        replicas: of data that several ranks hold one copy is saved; this says which copies to
            compare. "sample": every Python value and a small sample of the tensors; "check":
            everything; "off". Copies that differ raise ReplicaMismatchError. None: as the
            environment variable DCP_REPLICAS says; "sample" without it.
        remember_plans: whether the ranks of a group and its coordinator remember plans, so that
            unchanged ones are sent only once: see the guide, "Saves after the first". Not for
            subclasses, and not with enable_plan_caching, which is this planner's own memory.
        """
        self.replica_check = _choose_check(replicas, os.environ)
        self._entries: dict[str, bytes] = {}
        """Entries of values that were encoded before they are written."""
        self.replicas: Replicas | None = None
        """On the coordinator: which rows of the plans are replicas of each other."""
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.mappings = {}
        self.dedup_save_to_lowest_rank = dedup_save_to_lowest_rank
        if dedup_replicated_tensors is not None:
            logger.warning(
                "DefaultSavePlanner's `dedup_replicated_tensors` argument is being deprecated, "
                "and no longer has any effect. Please remove this argument from your call."
            )
        self.remember_plans = remember_plans
        self._enable_plan_caching = enable_plan_caching
        self._cached_plans_key = type(self).__name__
        self._cache = PlanCache() if enable_plan_caching else None

    def __getstate__(self) -> dict[str, Any]:
        """Only the state that the next save needs, which may run in another process."""
        return {name: value for name, value in vars(self).items() if name not in OF_ONE_SAVE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, replicas=None, _entries={})

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to save."""
        if self.flatten_state_dict:
            seen: list[tuple[Path, Any]] = []
            state_dict, paths = flatten(state_dict, note=lambda *found: seen.append(found))
            self.mappings = as_saved(paths)
            described = describe((as_saved_path(path), container) for path, container in seen)
            if described is not None:
                self.mappings.setdefault(DESCRIPTION, (described,))
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """This rank's possible write items: local, no communication."""
        items = write_items(self.state_dict)
        self.offered = items
        plan = _plan(items, lists_wanted(self, DefaultSavePlanner))
        if self.flatten_state_dict:
            plan = replace(plan, planner_data=self.mappings)
        self.plan = plan
        return plan if self._cache is None else self._cache.shorten_plan(plan)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Which rank writes which items, and the global metadata: on the coordinator.

        Raises PlanError naming every key whose parts do not form one whole tensor.
        """
        if self._cache is None:
            plans, self.metadata = self._create_global_plan(all_plans)
            self.global_plan = plans
            return plans, self.metadata
        rank_plans, self.global_plan, self.metadata = self._create_global_plan_with_caching(
            all_plans
        )
        return rank_plans, self.metadata

    def _create_global_plan_with_caching(
        self, all_plans: list[SavePlan]
    ) -> tuple[list[SavePlan], list[SavePlan], Metadata]:
        """The plans to send, the full plans, and the metadata: torch's hook.

        A rank that remembers its plan is sent an unusable one.
        """
        cache = self._plan_cache()
        full, digests = cache.recall_plans(all_plans)
        before = cache.answer
        if before is not None and before[0] == digests:
            _, plans, metadata, self.replicas = before
            unusable = [SavePlan([], usable=False) for _ in full]
            return unusable, plans, copy_metadata(metadata)
        plans, metadata = self._create_global_plan(full)
        cache.answer = (digests, plans, copy_metadata(metadata), self.replicas)
        return plans, plans, metadata

    def _finish_plan_with_caching(self, new_plan: SavePlan) -> SavePlan:
        """The plan that the rank received, or the one that it remembers: torch's hook."""
        return self._plan_cache().recall_plan(new_plan)

    def _plan_cache(self) -> PlanCache:
        """The memory of the last save; created here if it is missing."""
        if self._cache is None:
            self._cache = PlanCache()
        return self._cache

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan that this rank carries out."""
        caching = self._cache is not None
        self.plan = self._finish_plan_with_caching(new_plan) if caching else new_plan
        if not self._makes_data():
            self._entries = _encode_values(self.state_dict, self.plan.items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The tensor, or the serialised value, of an item."""
        found = self.transform_object(write_item, self.lookup_object(write_item.index))
        if not isinstance(found, torch.Tensor | io.BytesIO):
            raise TypeError(
                f"{write_item.index.fqn!r} resolved to {type(found).__name__}, "
                "not to a tensor or BytesIO"
            )
        return found

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The object at this index of the state dict: for subclasses to extend."""
        return find_state_dict_object(self.state_dict, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """The value stored for the object found: for subclasses to extend."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(_encode(write_item.index.fqn, object))
        return object

    def source(self, items: Sequence[WriteItem]) -> Callable[[int], torch.Tensor | bytes]:
        """A function that returns the data of the n-th item: a tensor, or a value's bytes.

        Skips the per-item hooks unless a subclass overrides them.
        """
        if not isinstance(items, WriteItems) or self._makes_data():
            return lambda row: plain_data(items[row].index.fqn, self.resolve_data(items[row]))
        fqns, state, entries = items.fqns, self.state_dict, self._entries
        values, numels = (items.kind == BYTES).tolist(), volumes(items.shape).tolist()

        def data(row: int) -> torch.Tensor | bytes:
            fqn = fqns[row]
            value = state[fqn]
            if values[row]:
                return entries.pop(fqn, None) or _encode(fqn, value)
            memory = local_tensor(value) if type(value) is DTensor else value
            if type(memory) in PLAIN and memory.numel() == numels[row]:
                return require_memory(fqn, memory)
            return plain_data(fqn, find_state_dict_object(state, items.key(row)))

        return data

    def lookup(self, items: WriteItems) -> Callable[[int], Any] | None:
        """A function that returns the state's data of the n-th row: a box's memory, or a value.

        None if a subclass computes its data: its hooks cannot be called twice.
        """
        if self._makes_data():
            return None
        state, values = self.state_dict, (items.kind == BYTES).tolist()

        def data(row: int) -> Any:
            value = state[items.fqns[row]]
            if values[row]:
                return value
            if type(value) in PLAIN and not hasattr(value, BOXES):
                return require_memory(items.fqns[row], value)
            if not isinstance(value, torch.Tensor):
                return value
            found: torch.Tensor = find_state_dict_object(state, items.key(row))
            return found if is_wrapper(found) else require_memory(items.fqns[row], found)

        return data

    def _makes_data(self) -> bool:
        """Whether a subclass overrides the hooks for the data of an item."""
        hooks = ("resolve_data", "lookup_object", "transform_object")
        return overridden(self, DefaultSavePlanner, hooks)

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        """The plans without replicas: torch's hook, for subclasses that have their own way."""
        tables = self._join_plans(all_plans).tables
        return [replace(p, items=list(t)) for p, t in zip(all_plans, tables, strict=True)]

    def _join_plans(self, all_plans: Sequence[SavePlan]) -> GlobalPlan:
        return global_plan(
            [WriteItems.of(plan.items) for plan in all_plans],
            to_lowest_rank=self.dedup_save_to_lowest_rank,
            complete=len(all_plans) > 1,
        )

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The result of `create_global_plan`, ignoring remembered plans: torch's hook."""
        if is_overridden(self, DefaultSavePlanner, "_dedup_save_plans"):
            all_plans = self._dedup_save_plans(list(all_plans))
        together = self._join_plans(all_plans)
        self.replicas = together.replicas
        self.planned = [plan.items for plan in all_plans]
        lists = lists_wanted(self, DefaultSavePlanner)
        plans = [
            replace(plan, items=_plan(items, lists).items)
            for plan, items in zip(all_plans, together.tables, strict=True)
        ]
        metadata = _metadata(together.index)
        if self.flatten_state_dict:
            metadata = replace(metadata, planner_data=merge_paths([p.planner_data for p in plans]))
        return plans, metadata


def create_default_local_save_plan(state_dict: dict[str, Any], is_coordinator: bool) -> SavePlan:
    """This rank's possible write items of a flat state dict; the global plan removes replicas."""
    return SavePlan(list(write_items(state_dict)))


def create_default_global_save_plan(
    all_plans: list[SavePlan], rewrite_index_hints: bool = True
) -> tuple[list[SavePlan], Metadata]:
    """The plans with index hints, and the metadata of all their items, without removing replicas.

    Raises PlanError when a value or an unsharded tensor is in two plans.
    """
    tables, index = concatenate_tables([WriteItems.of(plan.items) for plan in all_plans])
    if not rewrite_index_hints:
        return list(all_plans), _metadata(index)
    plans = [
        replace(plan, items=list(table)) for plan, table in zip(all_plans, tables, strict=True)
    ]
    return plans, _metadata(index)


def _plan(items: Any, lists: bool) -> SavePlan:
    return SavePlan(list(items) if lists else items)


def _metadata(index: Index) -> Metadata:
    keys: Any = KeyTable(index)
    return Metadata(keys)


KEPT_BYTES = 64 << 20
"""Entries of values that are not plain: encoded once to be judged, kept until they are written."""


def _encode_values(state: Mapping[str, Any], items: Sequence[WriteItem]) -> dict[str, bytes]:
    """The entries of values that are not plain; one warning lists values that no load accepts."""
    entries: dict[str, bytes] = {}
    refused: list[str] = []
    for fqn in _values_of(items):
        value = state.get(fqn)
        if plain(value):
            continue
        entry = _encode(fqn, value)
        reason = refusal_of(value, entry)
        if reason is not None:
            refused.append(f"{fqn!r}, a {type(value).__name__}: {reason}")
        if sum(map(len, entries.values())) + len(entry) <= KEPT_BYTES:
            entries[fqn] = entry
    if refused:
        more = f"\n... and {len(refused) - 10} more" if len(refused) > 10 else ""
        warn_caller(
            f"{len(refused)} value(s) of this save are refused by load unless it is given "
            "weights_only=False or the class is allowed with torch.serialization.add_safe_globals; "
            "save them as plain values instead:\n" + "\n".join(refused[:10]) + more,
        )
    return entries


def _values_of(items: Sequence[WriteItem]) -> list[str]:
    if isinstance(items, WriteItems):
        return [items.fqns[row] for row in np.flatnonzero(items.kind == BYTES).tolist()]
    return [item.index.fqn for item in items if item.type == WriteItemType.BYTE_IO]


def _encode(fqn: str, value: Any) -> bytes:
    """The value's entry; raises PlanError, naming the key, if it cannot be pickled."""
    try:
        return encode_value(value)
    except Exception as error:
        raise PlanError(
            f"{fqn!r} is a {type(value).__name__} that cannot be pickled: {error}"
        ) from error


def plain_data(fqn: str, data: torch.Tensor | io.BytesIO) -> torch.Tensor | bytes:
    """The result of a planner's `resolve_data`, in the form that the writer takes."""
    if isinstance(data, io.BytesIO):
        return data.getvalue()
    return encode_wrapper(fqn, data) if is_wrapper(data) else require_memory(fqn, data)
