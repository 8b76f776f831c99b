"""Converts between whole tensors and this rank's parts of them.

An example gives the layout of the result: a tensor, DTensor or ShardedTensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.placement_boxes import LocalBox
from pytest_dcp._engine.plan.shards import boxes_of, local_shards, part_of
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.sharded_tensors import (
    Shard,
    ShardedTensor,
    ShardMetadata,
    group_of_sharded_tensor,
    make_sharded_tensor_in_group,
)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor; the same object if it is already full. Collective for parts."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if isinstance(tensor, ShardedTensor):
        return _gather(tensor)
    return tensor


def _gather(tensor: ShardedTensor) -> torch.Tensor:
    """The full tensor, on every rank of the ShardedTensor's group: one message of equal pieces."""
    metadata, group = tensor.metadata(), group_of_sharded_tensor(tensor)
    boxes: dict[int, list[LocalBox]] = {n: [] for n in range(dist.get_world_size(group))}
    for shard in metadata.shards_metadata:
        owner: Any = shard.placement
        boxes[dist.get_group_rank(group, owner.rank())].append(_box(shard))
    longest = max(sum(map(_volume, of)) for of in boxes.values())
    shards = [shard.tensor for shard in tensor.local_shards()]
    device = shards[0].device if shards else torch.device("cpu")
    piece = torch.empty(longest, dtype=metadata.tensor_properties.dtype, device=device)
    if shards:
        flat = torch.cat([shard.reshape(-1) for shard in shards])
        piece[: flat.numel()] = flat
    pieces = [torch.empty_like(piece) for _ in boxes]
    dist.all_gather(pieces, piece, group=group)
    full = torch.empty(metadata.size, dtype=piece.dtype, device=device)
    for rank, of in boxes.items():
        at = 0
        for box in of:
            part = pieces[rank][at : at + _volume(box)]
            cut(full, box).copy_(part.view(box.shape))
            at += _volume(box)
    return full


def _volume(box: LocalBox) -> int:
    return math.prod(box.shape)


def size_of(tensor: torch.Tensor) -> torch.Size:
    """The size of the full tensor."""
    # A ShardedTensor's own methods warn of deprecation; its metadata do not.
    if isinstance(tensor, ShardedTensor):
        return torch.Size(tensor.metadata().size)
    return tensor.size()


def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy the value, of the same size, into this rank's part of the target.

    Collective only if the value is sharded in another way than the target.
    """
    if isinstance(target, DTensor) and isinstance(value, DTensor) and _is_alike(value, target):
        local_tensor(target).copy_(local_tensor(value))
        return
    full = whole(value)
    for box, memory in _local_parts(target):
        part_of(memory, box).copy_(cut(full, box))


def lay_out(value: torch.Tensor, like: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """The value in the layout of `like`, which has its size; the same object if that is its layout.

    Collective only if the value is sharded in another way than `like`. With `keep` a part is not a
    view of the value, whose memory can then be freed.
    """
    if isinstance(like, DTensor):
        if isinstance(value, DTensor) and value.device_mesh == like.device_mesh:
            same = value.placements == like.placements
            return value if same else value.redistribute(placements=like.placements)
        return _as_dtensor(whole(value), like, keep)
    if isinstance(like, ShardedTensor):
        if isinstance(value, ShardedTensor):
            return value
        return _as_sharded_tensor(whole(value), like, keep)
    return whole(value)


def _is_alike(one: DTensor, other: DTensor) -> bool:
    return one.device_mesh == other.device_mesh and one.placements == other.placements


def _as_dtensor(full: torch.Tensor, like: DTensor, keep: bool) -> DTensor:
    boxes = boxes_of("a tensor", like)
    memory = local_tensor(like)
    if len(boxes) == 1 and tuple(memory.shape) == boxes[0].shape:
        local = _part(full, boxes[0], memory.device, keep)
    else:
        local = torch.empty_like(memory, dtype=full.dtype)
        for box in boxes:
            part_of(local, box).copy_(cut(full, box))
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.size(),
        stride=like.stride(),
    )


def _as_sharded_tensor(full: torch.Tensor, like: ShardedTensor, keep: bool) -> ShardedTensor:
    shards = []
    for shard in like.local_shards():
        part = _part(full, _box(shard.metadata), shard.tensor.device, keep).contiguous()
        shards.append(Shard(part, shard.metadata))
    metadata = like.metadata()
    properties = replace(metadata.tensor_properties, dtype=full.dtype)
    return make_sharded_tensor_in_group(
        shards, replace(metadata, tensor_properties=properties), group_of_sharded_tensor(like)
    )


def _box(shard: ShardMetadata) -> LocalBox:
    sizes = tuple(shard.shard_sizes)
    return LocalBox(tuple(shard.shard_offsets), sizes, (0,) * len(sizes))


def _part(full: torch.Tensor, box: LocalBox, device: torch.device, keep: bool) -> torch.Tensor:
    """The box's elements on the device, with memory of their own if they are to be kept."""
    part = cut(full, box)
    moved = part.to(device)
    return moved.clone() if keep and moved is part else moved


def cut(full: torch.Tensor, box: LocalBox) -> torch.Tensor:
    """A view of the box's elements."""
    for dim, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
        if length != full.shape[dim]:
            full = full.narrow(dim, start, length)
    return full


def _local_parts(tensor: torch.Tensor) -> Iterator[tuple[LocalBox, torch.Tensor]]:
    """This rank's part of the tensor, and the memory that holds it."""
    if isinstance(tensor, ShardedTensor):
        yield from local_shards(tensor)
        return
    memory = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    for box in boxes_of("a tensor", tensor):
        yield box, memory
