"""A state dict without its tensors' elements: the data that a receiver needs to allocate them.

A description is plain data: the containers and values of the state, and for each tensor its dtype,
shape and layout. `describe` also lists the tensors whose elements are sent, and `rebuild` inserts
the received tensors, in the same order: each rank's own part of a DTensor, each shard of a
ShardedTensor.

Pure (no I/O).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.staging.stager import dtensor
from pytest_dcp._torch_internals.dtensors import (
    DTensorSpec,
    TensorMeta,
    _StridedShard,
    local_tensor,
)
from pytest_dcp._torch_internals.sharded_tensors import (
    EnumerableShardingSpec,
    ShardedTensor,
    ShardMetadata,
    TensorProperties,
    make_detached_sharded_tensor,
)
from pytest_dcp._torch_internals.sharded_tensors import Shard as ShardOfTensor


@dataclass(frozen=True, slots=True)
class TensorNote:
    """A plain tensor, or one part of another."""

    dtype: torch.dtype
    shape: torch.Size
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class MeshNote:
    """A device mesh. The receiver's has no process groups."""

    device_type: str
    shape: tuple[int, ...]
    ranks: list[int]
    dim_names: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class DTensorNote:
    """The part of a DTensor that the sender holds."""

    local: TensorNote
    mesh: MeshNote
    placements: list[tuple[str, int | str, int]]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class ShardedTensorNote:
    """The sender's shards of a ShardedTensor, and the places of all shards."""

    local: list[TensorNote]
    own: list[int]
    """For each local shard its index in `shards`."""
    shards: list[tuple[list[int], list[int], str]]
    """Offsets, sizes and placement of every rank's shards."""
    shape: torch.Size
    dtype: torch.dtype


record(TensorNote, MeshNote, DTensorNote, ShardedTensorNote)

Take = Callable[[TensorNote, torch.Tensor | None], torch.Tensor]
"""Returns the tensor of a note; it may fill the given one, the template's at the same place."""


def describe(state: Any) -> tuple[Any, list[torch.Tensor]]:
    """The description, and the tensors whose elements are sent, in its order.

    Raises TypeError for a tensor that has more than its elements.
    """
    tensors: list[torch.Tensor] = []
    return _describe(state, tensors), tensors


def rebuild(described: Any, take: Take, template: Any = None) -> Any:
    """The state of a description.

    template: a state dict that may hold tensors to fill, at the same places.
    """
    if isinstance(described, TensorNote):
        return take(described, template if type(template) in _PLAIN else None)
    if isinstance(described, DTensorNote):
        return _rebuild_dtensor(described, take, template)
    if isinstance(described, ShardedTensorNote):
        return _rebuild_sharded(described, take, template)
    if isinstance(described, dict):
        inside = template if isinstance(template, dict) else {}
        kind = type(described)
        return kind((key, rebuild(one, take, inside.get(key))) for key, one in described.items())
    if isinstance(described, list | tuple) and type(described) is not torch.Size:
        among: Any = template if type(template) is type(described) else ()
        return type(described)(
            rebuild(one, take, among[at] if at < len(among) else None)
            for at, one in enumerate(described)
        )
    return described


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _describe(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, DTensor):
        return _describe_dtensor(value, tensors)
    if isinstance(value, ShardedTensor):
        return _describe_sharded(value, tensors)
    if isinstance(value, torch.Tensor):
        return _note(value, tensors)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _describe(one, tensors)) for key, one in value.items())
    if type(value) in (list, tuple):
        return type(value)(_describe(one, tensors) for one in value)
    return value


def _note(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> TensorNote:
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_quantized:
        raise TypeError(
            f"a {type(tensor).__name__} of {tensor.layout} is more than its elements, and cannot "
            "be sent: send the tensors it is made of"
        )
    tensors.append(tensor.detach())
    return TensorNote(tensor.dtype, tensor.shape, tensor.requires_grad)


def _describe_dtensor(value: DTensor, tensors: list[torch.Tensor]) -> DTensorNote:
    mesh = value.device_mesh
    return DTensorNote(
        local=_note(local_tensor(value), tensors),
        mesh=MeshNote(
            mesh.device_type, tuple(mesh.shape), mesh.mesh.flatten().tolist(), mesh.mesh_dim_names
        ),
        placements=[_placement_note(one) for one in value.placements],
        shape=value.shape,
        stride=tuple(value.stride()),
        dtype=value.dtype,
    )


def _placement_note(placement: Placement) -> tuple[str, int | str, int]:
    if isinstance(placement, _StridedShard):
        return ("strided", placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return ("shard", placement.dim, 0)
    if isinstance(placement, Partial):
        return ("partial", placement.reduce_op, 0)
    if isinstance(placement, Replicate):
        return ("replicate", 0, 0)
    raise TypeError(f"{placement} cannot be sent to another rank")


def _placement(kind: str, what: Any, factor: int) -> Placement:
    makers: dict[str, Callable[[], Placement]] = {
        "strided": lambda: _StridedShard(what, split_factor=factor),
        "shard": lambda: Shard(what),
        "partial": lambda: Partial(what),
        "replicate": Replicate,
    }
    return makers[kind]()


def _rebuild_dtensor(note: DTensorNote, take: Take, template: Any) -> DTensor:
    if isinstance(template, DTensor) and _has_layout_of(template, note):
        take(note.local, local_tensor(template))
        return template
    mesh = DeviceMesh(
        note.mesh.device_type,
        torch.tensor(note.mesh.ranks, dtype=torch.int).reshape(note.mesh.shape),
        mesh_dim_names=note.mesh.dim_names,
        _init_backend=False,
    )
    spec = DTensorSpec(
        mesh,
        tuple(_placement(*one) for one in note.placements),
        tensor_meta=TensorMeta(note.shape, note.stride, note.dtype),
    )
    return dtensor(take(note.local, None), spec)


def _has_layout_of(template: DTensor, note: DTensorNote) -> bool:
    """Whether the sender's part is the template's own. Meshes may differ: a replica has its own."""
    part = local_tensor(template)
    return (
        (part.dtype, part.shape) == (note.local.dtype, note.local.shape)
        and template.shape == note.shape
        and [_placement_note(one) for one in template.placements] == note.placements
    )


def _describe_sharded(value: ShardedTensor, tensors: list[torch.Tensor]) -> ShardedTensorNote:
    metadata = value.metadata()
    everywhere = metadata.shards_metadata
    places = [tuple(one.shard_offsets) for one in everywhere]
    shards = value.local_shards()
    return ShardedTensorNote(
        local=[_note(shard.tensor, tensors) for shard in shards],
        own=[places.index(tuple(shard.metadata.shard_offsets)) for shard in shards],
        shards=[
            (list(one.shard_offsets), list(one.shard_sizes), str(one.placement))
            for one in everywhere
        ],
        shape=metadata.size,
        dtype=metadata.tensor_properties.dtype,
    )


def _is_sharded_as(template: ShardedTensor, note: ShardedTensorNote) -> bool:
    """Whether both are cut into the same shards, and this rank has some like the sender's."""
    cuts = [
        (list(one.shard_offsets), list(one.shard_sizes))
        for one in template.metadata().shards_metadata
    ]
    parts = [shard.tensor for shard in template.local_shards()]
    return (
        template.size() == note.shape
        and cuts == [(offsets, sizes) for offsets, sizes, _ in note.shards]
        and [(p.dtype, p.shape) for p in parts] == [(n.dtype, n.shape) for n in note.local]
    )


def _rebuild_sharded(note: ShardedTensorNote, take: Take, template: Any) -> ShardedTensor:
    if isinstance(template, ShardedTensor) and _is_sharded_as(template, note):
        for one, shard in zip(note.local, template.local_shards(), strict=True):
            take(one, shard.tensor)
        return template
    everywhere = [ShardMetadata(*one) for one in note.shards]
    shards = [
        ShardOfTensor(take(one, None), everywhere[at])
        for one, at in zip(note.local, note.own, strict=True)
    ]
    spec: Any = EnumerableShardingSpec(everywhere)
    metadata = spec.build_metadata(note.shape, TensorProperties(dtype=note.dtype))
    return make_detached_sharded_tensor(shards, metadata, spec)
