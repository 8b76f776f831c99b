"""Optimizer state of FSDP1, with the layout of the model's state dict.

A sharded optimizer is empty before its first step, so it has no state dict to load into: one is
built here from the checkpoint. Every tensor of it becomes a ShardedTensor over the ranks that share
the model's parameters, chunked along its first dimension. Under tensor parallelism a rank's
parameters are parts of the full ones; the model's own shards say which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.boxes import widen_table
from pytest_dcp._engine.plan.describe import Wanted, wanted_boxes
from pytest_dcp._engine.plan.index import index_of
from pytest_dcp._engine.plan.load import read_items
from pytest_dcp._engine.plan.nested import set_element
from pytest_dcp._engine.planners.load_planner import DefaultLoadPlanner
from pytest_dcp._engine.verbs.load import load
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.process_groups import devices_of
from pytest_dcp._torch_internals.sharded_tensors import (
    ChunkShardingSpec,
    Shard,
    ShardedTensor,
    _remote_device,
    group_of_sharded_tensor,
    make_sharded_tensor_in_group,
)
from pytest_dcp._torch_internals.sharded_tensors import TensorProperties as ShardedProperties
from pytest_dcp.errors import CheckpointMismatchError
from pytest_dcp.tracebacks import drop_inner_frames

__all__ = ["load_sharded_optimizer_state_dict"]


@drop_inner_frames
def load_sharded_optimizer_state_dict(
    model_state_dict: dict[str, Any],
    optimizer_key: str,
    storage_reader: StorageReader,
    planner: LoadPlanner | None = None,
) -> dict[str, Any]:
    """The optimizer's state dict, nested under `optimizer_key` as it was saved. Collective.

    model_state_dict: from FSDP with StateDictType.SHARDED_STATE_DICT; gives each parameter's part.
    optimizer_key: the key of the optimizer's state in the saved state dict.
    planner: used unless the model is tensor-parallel, when the parts need our own planner.

    Tensors of one element are plain; others are ShardedTensors on the group's device. Pass the
    value under `optimizer_key` to `FSDP.optim_state_dict_to_load`.

    Raises CheckpointMismatchError if the checkpoint lacks this key, CheckpointException as `load`
    does.
    """
    metadata = storage_reader.read_metadata()
    paths = _paths_below(metadata, optimizer_key)
    layout = _layout_of(model_state_dict)
    placement = _Placement.of(layout.group)
    state_dict: dict[str, Any] = {}
    offsets: dict[str, Sequence[int]] = {}
    for fqn, path in paths.items():
        stored = metadata.state_dict_metadata[fqn]
        if isinstance(stored, BytesStorageMetadata):
            state_dict[fqn] = "<bytes_io>"
        elif stored.size.numel() == 1:
            state_dict[fqn] = _empty(stored, stored.size, placement.device)
        else:
            # ("optimizer", "state", a parameter's name, "exp_avg"): the third is the model's key.
            parameter = path[2] if layout.group is not None and len(path) > 2 else None
            size = layout.sizes.get(parameter, stored.size)
            state_dict[fqn] = _make_sharded(stored, size, placement)
            if parameter in layout.offsets:
                offsets[fqn] = layout.offsets[parameter]
    if layout.group is not None:
        planner = _PartPlanner(offsets)
    load(state_dict, storage_reader=storage_reader, planner=planner)
    nested: dict[str, Any] = {}
    for fqn, path in paths.items():
        set_element(nested, path, state_dict[fqn])
    return nested


def _paths_below(metadata: Metadata, key: str) -> dict[str, tuple[Any, ...]]:
    """The paths of everything under a key of the checkpoint."""
    paths = metadata.planner_data
    if not isinstance(paths, Mapping):
        raise CheckpointMismatchError(
            "the checkpoint does not say how its state dict was nested: save it with "
            "DefaultSavePlanner(flatten_state_dict=True)"
        )
    below = {fqn: paths[fqn] for fqn in metadata.state_dict_metadata if paths[fqn][0] == key}
    if not below:
        tops = sorted({str(path[0]) for path in paths.values()})
        raise CheckpointMismatchError(
            f"the checkpoint has nothing under {key!r}; it has {tops[:20]}", missing=(key,)
        )
    return below


@dataclass(frozen=True, slots=True)
class _ModelLayout:
    """This rank's parts of the full parameters."""

    sizes: dict[Any, torch.Size | Sequence[int]] = field(default_factory=dict)
    """Size of each parameter, or of this rank's tensor-parallel part of it."""
    offsets: dict[Any, Sequence[int]] = field(default_factory=dict)
    """Offset of that part in the full parameter."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the part; None: the model is not tensor-parallel."""


def _layout_of(model_state_dict: Mapping[str, Any]) -> _ModelLayout:
    sizes: dict[Any, torch.Size | Sequence[int]] = {}
    offsets: dict[Any, Sequence[int]] = {}
    group: dist.ProcessGroup | None = None
    for fqn, value in model_state_dict.items():
        part = _part_of(fqn, value)
        if part is None:
            sizes[fqn] = value.size()
            continue
        sizes[fqn], offsets[fqn] = part.metadata.shard_sizes, part.metadata.shard_offsets
        inner: Any = part.tensor
        group = group_of_sharded_tensor(inner)
    return _ModelLayout(sizes, offsets, group)


def _part_of(fqn: str, value: Any) -> Shard | None:
    """The tensor-parallel part that FSDP sharded again, or None for other values.

    Raises ValueError for nestings that FSDP1 does not make.
    """
    if isinstance(value, DTensor):
        if isinstance(local_tensor(value), DTensor | ShardedTensor):
            raise ValueError(f"Cannot handle nested DTensor: {fqn!r}")  # noqa: TRY004 - torch's type
        return None
    if not isinstance(value, ShardedTensor) or not value.local_shards():
        return None
    shards = value.local_shards()
    if isinstance(shards[0].tensor, DTensor):
        problem = f"Cannot handle DTensor nested inside ShardedTensor: {fqn!r}"
        raise ValueError(problem)  # noqa: TRY004 - torch's type
    if not isinstance(shards[0].tensor, ShardedTensor):
        return None
    if len(shards) != 1:
        raise ValueError(f"expected one shard of {fqn!r} on this rank, got {len(shards)}")
    return shards[0]


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where the chunks of a tensor are."""

    group: dist.ProcessGroup
    spec: ChunkShardingSpec
    device: torch.device
    """Of this rank."""

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Placement:
        """Chunks along the first dimension over the ranks of a group, or over all ranks."""
        whole = dist.group.WORLD if group is None else group
        if whole is None:
            raise ValueError(
                "the default process group is not initialised: call init_process_group"
            )
        kind = _device_type(whole)
        ranks = dist.get_process_group_ranks(whole)
        places: list[Any] = [f"rank:{rank}/{_device_of(kind, rank)}" for rank in ranks]
        here = torch.device(kind)
        if kind != "cpu":
            here = torch.device(kind, torch.get_device_module(kind).current_device())
        return cls(whole, ChunkShardingSpec(dim=0, placements=places), here)


def _device_type(group: dist.ProcessGroup) -> str:
    """Torch's device of the group: the CPU if the group supports it."""
    kinds = {device.type for device in devices_of(group)}
    return "cpu" if "cpu" in kinds or not kinds else min(kinds)


def _device_of(kind: str, rank: int) -> str:
    if kind == "cpu":
        return kind
    count = torch.get_device_module(kind).device_count()
    return f"{kind}:{rank % count}" if count else "cpu"


def _empty(
    stored: TensorStorageMetadata, size: Sequence[int], device: torch.device
) -> torch.Tensor:
    properties = stored.properties
    return torch.empty(
        tuple(size),
        dtype=properties.dtype,
        layout=properties.layout,
        requires_grad=properties.requires_grad,
        pin_memory=properties.pin_memory,
        device=device,
    )


def _make_sharded(
    stored: TensorStorageMetadata, size: Sequence[int], placement: _Placement
) -> ShardedTensor:
    """An empty tensor of this size, chunked; only this rank's chunk takes memory."""
    properties = stored.properties
    metadata = placement.spec.build_metadata(
        torch.Size(size),
        ShardedProperties(
            dtype=properties.dtype,
            layout=properties.layout,
            requires_grad=properties.requires_grad,
            memory_format=properties.memory_format,
            pin_memory=properties.pin_memory,
        ),
    )
    # The last ranks of a short tensor have no rows, and FSDP lists no shard for them.
    metadata.shards_metadata = [
        shard for shard in metadata.shards_metadata if all(shard.shard_sizes)
    ] or metadata.shards_metadata[:1]
    shards = [
        Shard(_empty(stored, shard.shard_sizes, placement.device), shard)
        for shard in metadata.shards_metadata
        if isinstance(shard.placement, _remote_device) and shard.placement.rank() == dist.get_rank()
    ]
    return make_sharded_tensor_in_group(shards, metadata, placement.group)


class _PartPlanner(DefaultLoadPlanner):
    """Loads tensors that are parts of the stored ones."""

    def __init__(self, offsets: Mapping[str, Sequence[int]]) -> None:
        """offsets: where each part begins in the stored tensor; tensors without one are whole."""
        super().__init__()
        self.offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        """This rank's read items."""
        if self.metadata is None:
            raise ValueError("the planner was set up without metadata: it has nothing to load from")
        index = index_of(self.metadata)
        here = wanted_boxes(self.state_dict)
        shift = _shifts(here, self.offsets)
        found = read_items(replace(here, offset=here.offset + shift), index)
        # Read the boxes at their stored offsets, and fill them at this rank's own.
        width = found.wanted_offset.shape[1]
        by_box = dict(zip(_boxes(here.fqns, here.nth), widen_table(shift, width, 0), strict=True))
        back = [by_box[box] for box in _boxes(found.fqns, found.wanted_hint)]
        moved = np.array(back, dtype=np.int64).reshape(found.wanted_offset.shape)
        items: Any = list(replace(found, wanted_offset=found.wanted_offset - moved))
        return LoadPlan(items)


def _boxes(fqns: Sequence[str], nth: Iterable[int]) -> list[tuple[str, int]]:
    """A name and a number that identify the box of each row; a value's number is 0."""
    return [(fqn, max(int(n), 0)) for fqn, n in zip(fqns, nth, strict=True)]


def _shifts(boxes: Wanted, offsets: Mapping[str, Sequence[int]]) -> Any:
    """(n, k) how far each wanted box is moved."""
    shift = np.zeros_like(boxes.offset)
    for row, fqn in enumerate(boxes.fqns):
        if fqn in offsets:
            shift[row, : boxes.ndim[row]] = offsets[fqn]
    return shift
