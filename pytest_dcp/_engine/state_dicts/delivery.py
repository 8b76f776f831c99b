"""A state dict as the options request it: sharded or full, on its device or the CPU, or on rank 0.

Full tensors are gathered in the state dict's order, small ones together in one message. At most one
bucket, or one tensor, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from pytest_dcp._engine.plan.placement_boxes import LocalBox, local_boxes
from pytest_dcp._engine.state_dicts.options import StateDictOptions
from pytest_dcp._engine.state_dicts.packing import BUCKET_BYTES, Spec, views
from pytest_dcp._engine.state_dicts.parts import cut, whole
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor


def deliver_state(state: dict[str, Any], options: StateDictOptions) -> dict[str, Any]:
    """The state in the form that the options request. Collective if tensors are gathered.

    {} if only rank 0 gets it and this is another rank.
    """
    if not options.full_state_dict:
        return _change_tensors(state, _on_cpu) if options.cpu_offload else state
    tensors: list[torch.Tensor] = []
    _change_tensors(state, tensors.append)
    arriving = whole_tensors(tensors)
    if not options.cpu_offload:
        return _change_tensors(state, lambda _: next(arriving))
    if dist.is_initialized() and dist.get_rank():
        for _ in arriving:  # The others need this rank's parts; it keeps nothing.
            pass
        return {}
    return _change_tensors(state, lambda _: next(arriving).cpu())


def _change_tensors(state: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """A copy of the state's containers with each tensor changed, in order."""
    return {key: _map_value(value, change) for key, value in state.items()}


def _map_value(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_value(inner, change) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_value(inner, change) for inner in value)
    return value


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, ShardedTensor) and all(
        shard.tensor.is_cpu for shard in tensor.local_shards()
    ):
        return tensor
    return tensor.cpu()


def whole_tensors(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The full tensor of each, in order; the same object if it is already full. Collective."""
    bucket: list[torch.Tensor] = []
    used = 0
    for tensor in tensors:
        size_bytes = tensor.numel() * tensor.itemsize if _way_of(tensor) is not None else 0
        if used + size_bytes > BUCKET_BYTES:
            yield from _whole_bucket(bucket)
            bucket, used = [], 0
        bucket.append(tensor)
        used += size_bytes
    yield from _whole_bucket(bucket)


_Way = tuple[DeviceMesh, int]
"""A mesh and the one dimension of it that tensors are sharded over."""


def _way_of(tensor: torch.Tensor) -> _Way | None:
    """With which other tensors a tensor can be gathered; None: it is gathered alone."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
        return None
    sharded = [dim for dim, placement in enumerate(tensor.placements) if type(placement) is Shard]
    others = [placement for placement in tensor.placements if type(placement) is not Shard]
    if len(sharded) != 1 or not all(type(placement) is Replicate for placement in others):
        return None
    return tensor.device_mesh, sharded[0]


def _whole_bucket(bucket: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    # Every rank has the same tensors in the same order, so all ranks form the same messages.
    together: dict[_Way, list[int]] = {}
    for at, tensor in enumerate(bucket):
        if (way := _way_of(tensor)) is not None:
            together.setdefault(way, []).append(at)
    found: dict[int, torch.Tensor] = {}
    for way, places in together.items():
        parts = [bucket[at] for at in places]
        found |= zip(places, _gather_in_one_message(way, parts), strict=True)
    for at, tensor in enumerate(bucket):
        yield found[at] if at in found else whole(tensor)


def _gather_in_one_message(way: _Way, parts: Sequence[Any]) -> list[torch.Tensor]:
    """The full tensors of DTensors, gathered with one message of each rank."""
    mesh, dim = way
    group = mesh.get_group(dim)
    boxes = [[_box_at(part, dim, at) for part in parts] for at in range(mesh.size(dim))]
    specs = [
        [Spec(torch.Size(box.shape), part.dtype) for box, part in zip(of, parts, strict=True)]
        for of in boxes
    ]
    # all_gather needs messages of one length; ranks with smaller shards leave the ends unused.
    longest = max(sum(spec.packed_bytes for spec in of) for of in specs)
    device = local_tensor(parts[0]).device
    memory = torch.empty(len(specs), longest, dtype=torch.uint8, device=device)
    here = mesh.get_local_rank(dim)
    mine = torch.empty_like(memory[0])
    for view, part in zip(views(mine, specs[here]), parts, strict=True):
        if view.numel():  # An empty part may have any shape.
            view.copy_(local_tensor(part))
    dist.all_gather(list(memory), mine, group=group)
    full = [torch.empty(part.size(), dtype=part.dtype, device=device) for part in parts]
    for row, of, row_boxes in zip(memory, specs, boxes, strict=True):
        for target, box, view in zip(full, row_boxes, views(row, of), strict=True):
            cut(target, box).copy_(view)
    return full


def _box_at(part: DTensor, dim: int, at: int) -> LocalBox:
    """The part of a tensor that the rank at position `at` of the mesh's dimension holds."""
    mesh = part.device_mesh
    coordinate = list(mesh.get_coordinate() or ())
    coordinate[dim] = at
    (box,) = local_boxes(tuple(part.size()), tuple(mesh.shape), tuple(coordinate), part.placements)
    return box
