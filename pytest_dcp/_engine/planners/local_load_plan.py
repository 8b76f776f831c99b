"""A flat state dict and a checkpoint's index -> this rank's read items. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.describe import wanted_boxes
from pytest_dcp._engine.plan.index import Index, index_of, resized_keys
from pytest_dcp._engine.plan.load import read_items
from pytest_dcp._engine.plan.match_keys import Dtype, LoadReport, match
from pytest_dcp._engine.plan.opaque import STORED_DTYPES
from pytest_dcp._engine.plan.per_rank import PerRank, is_of_other_ranks, resized_names
from pytest_dcp._engine.plan.select import Selection
from pytest_dcp._engine.plan.shards import PLAIN
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import CheckpointMismatchError


def create_default_local_load_plan(
    state_dict: dict[str, Any], metadata: Metadata, strict: bool = True
) -> LoadPlan:
    """This rank's read items for a flat state dict.

    Raises CheckpointMismatchError naming every key that does not fit, and every missing one if
    `strict`.
    """
    planned = plan_reads(
        state_dict,
        index_of(metadata),
        Selection(),
        MatchRules(strict, partial=resized_keys(metadata, {})),
    )
    return with_list_of_items(planned.plan)


def create_default_global_load_plan(all_plans: list[LoadPlan]) -> list[LoadPlan]:
    """The plans, unchanged: no rank's load depends on another's."""
    return all_plans


@dataclass(frozen=True, slots=True)
class NumberRoom:
    """Memory for a number that is loaded from a stored tensor."""

    kind: type
    """The number's class."""
    tensor: torch.Tensor
    """Empty, like the stored one: it is filled, then the number is taken out of it."""


@dataclass(frozen=True, slots=True)
class MatchRules:
    """Which differences between a state dict and a checkpoint a load accepts."""

    strict: bool
    """Whether missing keys, and other kinds of dtypes, are refused."""
    per_rank: Mapping[str, PerRank] = field(default_factory=dict)
    """The PerRank values of the state dict, by name."""
    takes_numbers: bool = False
    """Whether stored tensors may be loaded into numbers; otherwise such a number is refused."""
    partial: Container[str] = ()
    """Stored names that may lack elements."""


@dataclass(frozen=True, slots=True)
class PlannedReads:
    """What to read, and what the targets still need before they can be filled."""

    plan: LoadPlan
    report: LoadReport
    """How the keys matched."""
    without_memory: Mapping[str, Any]
    """The meta tensors among the targets, which need memory."""
    numbers: Mapping[str, NumberRoom] = field(default_factory=dict)
    """Numbers that are loaded from tensors."""
    wrappers: frozenset[str] = frozenset()
    """Names whose targets are wrappers of other tensors, or DTensors of them."""
    self_described: frozenset[str] = frozenset()
    """Names whose targets describe their own parts."""


def plan_reads(
    state_dict: Mapping[str, Any], index: Index, selection: Selection, rules: MatchRules
) -> PlannedReads:
    """The plan, how the keys matched, and which targets need memory. Changes nothing."""
    chosen = selection.choose(state_dict)
    stored_as = selection.stored_as(chosen)
    if rules.per_rank:
        stored_as = _choose_per_rank(chosen, stored_as, index, rules)
    numbers_too = rules.takes_numbers
    found = match(chosen, index, strict=rules.strict, stored_as=stored_as, numbers=numbers_too)
    names = stored_as or {}
    numbers = _rooms_for_numbers(found.converted, names, index) if numbers_too else {}
    found.loaded.update({fqn: room.tensor for fqn, room in numbers.items()})
    values = {index.fqns[row] for row in np.flatnonzero(index.ndim < 0).tolist()}
    # A stored value replaces any value here.
    replaced = [fqn for fqn in found.loaded if names.get(fqn, fqn) in values] if values else []
    replaced += _stored_in_one(found.loaded, names, index)
    template = found.loaded | dict.fromkeys(replaced)
    lacking = (
        {fqn for fqn in found.loaded if names.get(fqn, fqn) in rules.partial}
        if rules.partial
        else ()
    )
    boxes = wanted_boxes(template)
    items: Any = read_items(boxes, index, stored_as, partial=lacking)
    unexpected = tuple(
        name for name in found.unexpected if not is_of_other_ranks(name, rules.per_rank)
    )
    return PlannedReads(
        LoadPlan(items),
        LoadReport(found.missing, unexpected, found.converted),
        {fqn: value for fqn, value in found.loaded.items() if _is_meta(value)},
        numbers,
        boxes.wrappers,
        boxes.self_described,
    )


def _rooms_for_numbers(
    converted: Mapping[str, tuple[Dtype, Dtype]], names: Mapping[str, str], index: Index
) -> dict[str, NumberRoom]:
    """Memory for each number that is stored as a tensor.

    converted: by name the stored dtype, and the class of the number.
    """
    rooms = {}
    for fqn, (_, kind) in converted.items():
        if isinstance(kind, type):
            stored: Any = index.value(index.row_of[names.get(fqn, fqn)])
            empty = torch.empty(stored.size, dtype=stored.properties.dtype)
            rooms[fqn] = NumberRoom(kind, empty)
    return rooms


def _stored_in_one(loaded: Mapping[str, Any], names: Mapping[str, str], index: Index) -> list[str]:
    """Names of quantised tensors: torch stores them, with their scales, as tensors; they are read
    as values.

    Raises CheckpointMismatchError for a tensor stored in parts.
    """
    if all(properties.dtype in STORED_DTYPES for properties in index.properties):
        return []
    opaque = [fqn for fqn, value in loaded.items() if type(value) in PLAIN and value.is_quantized]
    chunks = {fqn: np.diff(index.first)[index.row_of[names.get(fqn, fqn)]] for fqn in opaque}
    if parted := [fqn for fqn, count in chunks.items() if count > 1]:
        raise CheckpointMismatchError(
            f"{', '.join(map(repr, parted))}: stored in parts, which cannot be joined to one "
            "quantised tensor",
            mismatched=tuple(parted),
        )
    return opaque


def _choose_per_rank(
    chosen: dict[str, Any],
    stored_as: Mapping[str, str] | None,
    index: Index,
    rules: MatchRules,
) -> dict[str, str]:
    """The checkpoint's names for these names, including names below a PerRank that another number
    of ranks saved.

    Removes from `chosen` the names that stay unchanged.
    """
    names = dict(stored_as or {})
    per_rank_names = {
        fqn: (names.get(fqn, fqn), value)
        for prefix, value in rules.per_rank.items()
        for fqn in chosen
        if fqn.startswith(prefix) and names.get(fqn, fqn) not in index.row_of
    }
    for fqn, name in resized_names(per_rank_names, index.fqns, strict=rules.strict).items():
        if name is None:
            del chosen[fqn]
        else:
            names[fqn] = name
    return names


def _is_meta(value: Any) -> bool:
    if type(value) in PLAIN or type(value) is DTensor:
        return bool(value.is_meta)
    if isinstance(value, ShardedTensor):
        # Its own `is_meta` works only with exactly one shard.
        return any(shard.tensor.is_meta for shard in value.local_shards())
    return isinstance(value, torch.Tensor) and value.is_meta


def with_list_of_items(plan: LoadPlan) -> LoadPlan:
    """The plan with its items as torch's objects, for hooks that change them."""
    return replace(plan, items=list(plan.items))
