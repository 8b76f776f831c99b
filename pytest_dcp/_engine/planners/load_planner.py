"""The load planner: a state dict and a checkpoint's index -> read items and their targets."""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.tensor import DTensor, Replicate, Shard

from pytest_dcp._engine.format.opaque_values import prepare_opaque, wrapper_in
from pytest_dcp._engine.format.python_values import decode_value
from pytest_dcp._engine.format.wrapper_parts import copy_box
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.declared_parts import BOXES
from pytest_dcp._engine.plan.hooks import lists_wanted, overridden
from pytest_dcp._engine.plan.index import Index, index_of, resized_keys, stated_sizes
from pytest_dcp._engine.plan.match_keys import Dtype, LoadReport
from pytest_dcp._engine.plan.materialise import empty_for_meta, materialise
from pytest_dcp._engine.plan.nested import Path, flatten, set_element
from pytest_dcp._engine.plan.numbers import check_number, fill_tensor, number_of
from pytest_dcp._engine.plan.opaque import is_opaque, is_wrapper
from pytest_dcp._engine.plan.per_rank import PerRank
from pytest_dcp._engine.plan.select import Selection
from pytest_dcp._engine.plan.shards import PLAIN, boxes_of
from pytest_dcp._engine.plan.value_tensors import check_tensor, tensor_misfit
from pytest_dcp._engine.planners.local_load_plan import (
    MatchRules,
    create_default_global_load_plan,
    plan_reads,
    with_list_of_items,
)
from pytest_dcp._engine.planners.state_lookup import find_state_dict_object
from pytest_dcp._torch_internals.dtensors import local_tensor, spec_of
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    UntrustedPickleError,
)

ONE_BOX = frozenset((Shard, Replicate))
"""Placements under which the rank's memory is one box of the full tensor; strided shards may be
several."""


class DefaultLoadPlanner(default_planner.DefaultLoadPlanner):
    """Plans a load into a state dict: tensors in place, values replaced, in any layout."""

    original_state_dict: dict[str, Any]
    mappings: dict[str, Path]
    _numbers: dict[str, type]
    """By name: the class of each number that is loaded from a tensor."""
    _wrappers: frozenset[str]
    """Names of wrappers of other tensors, and of DTensors of them."""
    _self_described: frozenset[str]
    """Names of tensors that describe their own parts."""

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        weights_only: bool = True,
        selection: Selection | None = None,
    ) -> None:
        """As torch's, and:

        weights_only: whether values of arbitrary classes are refused. Pass False only for a
            checkpoint whose writer you trust: such values run code when they are loaded.
        selection: which keys to load, and their names in the checkpoint; None: all, unrenamed.
        """
        self.flatten_state_dict = flatten_state_dict
        self.flatten_sharded_tensors = flatten_sharded_tensors
        self.original_state_dict = {}
        self.mappings = {}
        self.allow_partial_load = allow_partial_load
        self.weights_only = weights_only
        self.selection = selection or Selection()
        self.report = LoadReport()
        self.idle_renames: dict[str, str] = {}
        """Entries of the selection's `rename` that match nothing on this rank, and why."""
        self._per_rank: dict[str, PerRank] = {}
        """By the prefixes of their flat names."""
        self._saved_sizes: Mapping[str, torch.Size] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to fill."""
        if overridden(self, DefaultLoadPlanner, ("create_local_plan",)):
            # Its own plan may take any of them.
            materialise(state_dict)
        self.original_state_dict = state_dict
        self._per_rank = {}
        self._numbers = {}
        self._wrappers = self._self_described = frozenset()
        self.state_dict, self.mappings = self._flat()
        self.metadata = metadata
        self.is_coordinator = is_coordinator
        if overridden(self, DefaultLoadPlanner, ("create_local_plan",)):
            # It may change the sizes that the metadata state: see `resized_keys`.
            self._saved_sizes = stated_sizes(metadata)

    def create_local_plan(self) -> LoadPlan:
        """This rank's read items.

        A subclass may change a key's size in the metadata so that it fits a tensor of another size;
        then only the overlap is read.

        Raises CheckpointMismatchError naming every key that is missing or does not fit.
        """
        if self.metadata is None:
            raise ValueError("the planner was set up without metadata: it has nothing to load from")
        index = index_of(self.metadata)
        self._read_as_torch_2_3(index)
        self.idle_renames = self.selection.idle_renames(
            self.state_dict, index.row_of, tuple(self._per_rank)
        )
        try:
            rules = MatchRules(
                strict=not self.allow_partial_load,
                per_rank=self._per_rank,
                takes_numbers=True,
                partial=resized_keys(self.metadata, self._saved_sizes),
            )
            planned = plan_reads(self.state_dict, index, self.selection, rules)
            # Only now: a mismatch is refused before the state dict changes.
            for fqn, room in planned.numbers.items():
                self._numbers[fqn], self.state_dict[fqn] = room.kind, room.tensor
            self._materialise(planned.without_memory)
        except CheckpointMismatchError as error:
            raise error.with_lines(self.idle_renames.values()) from None
        self.report = planned.report
        self._wrappers, self._self_described = planned.wrappers, planned.self_described
        lists = lists_wanted(self, DefaultLoadPlanner)
        return with_list_of_items(planned.plan) if lists else planned.plan

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The plans, unchanged: no rank's load depends on another's."""
        return create_default_global_load_plan(global_plan)

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        """The plan, unchanged."""
        return new_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value in its place in the state dict."""
        self.put_value(read_item.dest_index.fqn, value.getbuffer())

    def put_value(self, fqn: str, entry: bytes | memoryview) -> None:
        """Decode a value's entry and put it in its place in the state dict."""
        self.prepare_value(fqn, entry)()

    def prepare_value(self, fqn: str, entry: bytes | memoryview) -> Callable[[], None]:
        """Decode a value's entry; the returned function puts it in its place in the state dict.

        Raises CheckpointMismatchError, naming the key, for a tensor or a number that the tensor of
        the state dict cannot take, CheckpointCorruptError for a damaged entry and for a class that
        is not loaded by default. The state dict is then unchanged.
        """
        here: Any = self.state_dict.get(fqn)
        strict = not self.allow_partial_load
        if is_opaque(here):
            return partial(self._fill_opaque, fqn, here, prepare_opaque(fqn, here, entry))
        if isinstance(here, DTensor) and is_wrapper(local_tensor(here)):
            return copy_box(fqn, local_tensor(here), boxes_of(fqn, here), here.shape, entry)
        value = self._decode(fqn, entry, here)
        if not isinstance(here, torch.Tensor):
            return partial(self._put, fqn, value)
        if not isinstance(value, torch.Tensor):
            number = check_number(fqn, here, value, strict=strict)
            return partial(self._fill_number, fqn, here, number, type(value))
        check_tensor(fqn, here, value, strict=strict)
        return partial(self._fill_plain, fqn, here, value)

    @property
    def takes_numbers(self) -> Container[str]:
        """Names of numbers that are loaded from tensors, into memory of the planner's own."""
        return getattr(self, "_numbers", ())

    @property
    def wrapper_targets(self) -> Container[str]:
        """Names of wrappers of other tensors, and of DTensors of them."""
        return getattr(self, "_wrappers", ())

    def check_read_number(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Raise CheckpointMismatchError if the number that was read does not fit."""
        fqn = read_item.dest_index.fqn
        number_of(fqn, tensor, self._numbers[fqn], strict=not self.allow_partial_load)

    def _decode(self, fqn: str, entry: bytes | memoryview, here: Any) -> Any:
        try:
            return decode_value(entry, weights_only=self.weights_only)
        except UntrustedPickleError as error:
            wrapper = wrapper_in(entry) if isinstance(here, torch.Tensor) else None
            if wrapper is not None:
                raise tensor_misfit(fqn, here, wrapper) from error
            raise error.at(entry=fqn) from error
        except CheckpointCorruptError as error:
            raise error.at(entry=fqn) from error

    def _fill_opaque(self, fqn: str, here: Any, fill: Callable[[], torch.Tensor]) -> None:
        filled_in = fill()
        if filled_in is not here:
            self._put(fqn, filled_in)

    def _fill_number(self, fqn: str, here: torch.Tensor, number: Any, kind: type) -> None:
        fill_tensor(here, number)
        self._note_conversion(fqn, kind, here.dtype)

    def _fill_plain(self, fqn: str, here: torch.Tensor, value: torch.Tensor) -> None:
        here.detach().copy_(value)
        if value.dtype != here.dtype:
            self._note_conversion(fqn, value.dtype, here.dtype)

    def _put(self, fqn: str, value: Any) -> None:
        """Put this value in the state dict."""
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], value)
        else:
            self.original_state_dict[fqn] = value
        self.state_dict[fqn] = value

    def _note_conversion(self, fqn: str, stored: Dtype, target: Dtype) -> None:
        self.report = replace(
            self.report, converted={**self.report.converted, fqn: (stored, target)}
        )

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The view of the target that an item fills."""
        return self.transform_tensor(read_item, self.lookup_tensor(read_item.dest_index))

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Store a number that was read into a tensor of its own; nothing for other tensors."""
        fqn = read_item.dest_index.fqn
        if fqn in self._numbers:
            kind, strict = self._numbers[fqn], not self.allow_partial_load
            self._put(fqn, number_of(fqn, tensor, kind, strict=strict))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The rank's own memory of a wanted box: for subclasses to extend."""
        found: torch.Tensor = find_state_dict_object(self.state_dict, index)
        return found

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """The part of it that an item fills: for subclasses to extend."""
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            if (start, length) != (0, tensor.size(dim)):
                tensor = tensor.narrow(dim, start, length)
        return tensor

    def targets(self, items: ReadItems) -> Callable[[int], torch.Tensor] | None:
        """A function that returns the whole wanted box of the n-th item; None: call the hooks.

        The engine narrows it itself, for many items at a time, and never calls it for the names in
        `takes_numbers`.
        """
        hooks = ("resolve_tensor", "commit_tensor", "lookup_tensor", "transform_tensor")
        if overridden(self, DefaultLoadPlanner, hooks):
            return None
        firsts = (items.wanted_hint == 0).tolist()
        fqns, state = items.fqns, self.state_dict
        self_described = getattr(self, "_self_described", ())

        def target(row: int) -> torch.Tensor:
            memory = value = state[fqns[row]]
            if type(value) is DTensor and ONE_BOX.issuperset(map(type, spec_of(value).placements)):
                memory = local_tensor(value)
            plain = firsts[row] and type(memory) in PLAIN and not hasattr(value, BOXES)
            if plain and fqns[row] not in self_described:
                found: torch.Tensor = memory
                return found
            return self._box(items, row)

        return target

    @property
    def plans_alone(self) -> bool:
        """Whether no rank's plan depends on another's, so that ranks need not send plans."""
        return not overridden(self, DefaultLoadPlanner, ("create_global_plan",))

    @property
    def takes_values(self) -> bool:
        """Whether `put_value` may be used instead of `load_bytes`."""
        return not overridden(self, DefaultLoadPlanner, ("load_bytes",))

    @property
    def repeatable(self) -> bool:
        """Whether an interrupted load may begin again with another checkpoint.

        Not if keys may be missing: they would keep the values that the first try loaded.
        """
        return type(self) is DefaultLoadPlanner and not self.allow_partial_load

    @property
    def plans_again(self) -> bool:
        """Whether a load that has read nothing yet may be planned again, for another checkpoint.

        A user's planner may not expect it.
        """
        return type(self) is DefaultLoadPlanner

    def begin_again(self) -> None:
        """Prepare for another try with the same state dict."""

    def _materialise(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace meta tensors that are to be loaded by empty ones."""
        if sharded := [fqn for fqn, value in values.items() if isinstance(value, ShardedTensor)]:
            raise CheckpointMismatchError(
                f"{', '.join(map(repr, sharded[:20]))}: a ShardedTensor on the meta device cannot "
                "be loaded to",
                mismatched=tuple(sharded),
            )
        for fqn, empty in {fqn: empty_for_meta(value) for fqn, value in values.items()}.items():
            self._put(fqn, empty)

    def _box(self, items: ReadItems, row: int) -> torch.Tensor:
        """The memory of the box that the row fills, in a tensor of which this rank has several."""
        offset = items.wanted_offset[row, : items.ndim[row]].tolist()
        return self.lookup_tensor(MetadataIndex(items.fqns[row], offset))

    def _flat(
        self, *, plain_mappings_whole: bool = False
    ) -> tuple[dict[str, Any], dict[str, Path]]:
        if not self.flatten_state_dict:
            return dict(self.original_state_dict), {}

        def note(path: Path, container: Any) -> None:
            if isinstance(container, PerRank):
                self._per_rank[".".join(map(str, (*path, "")))] = container

        return flatten(
            self.original_state_dict, plain_mappings_whole=plain_mappings_whole, note=note
        )

    def _read_as_torch_2_3(self, index: Index) -> None:
        """Flatten as torch before 2.4 did, if the checkpoint has keys that only this gives."""
        unknown = set(index.fqns) - set(self.state_dict)
        if not self.flatten_state_dict or not unknown:
            return
        flat, paths = self._flat(plain_mappings_whole=True)
        # Such a checkpoint has a mapping whole or in parts; it has both only if ranks saved
        # different things under one key.
        in_parts = (self.state_dict.keys() - flat.keys()) & index.row_of.keys()
        if unknown & flat.keys() and not in_parts:
            self.state_dict, self.mappings = flat, paths
