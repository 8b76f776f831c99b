"""Meta tensors of a state dict -> empty tensors on the device to load them to."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.declared_parts import declarations_of, declare_parts
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import CheckpointMismatchError


def materialise(state_dict: dict[Any, Any]) -> None:
    """Replace every meta tensor at any depth, in place: containers stay the same objects.

    A DTensor goes to its mesh's device type, a plain tensor to the process group's (the CPU if the
    group supports it, or if there is no group), both to this rank's current device of that type.
    """
    for key, value in state_dict.items():
        state_dict[key] = _materialise(value)


def _materialise(value: Any) -> Any:
    if isinstance(value, ShardedTensor):
        return value
    if isinstance(value, torch.Tensor):
        return empty_for_meta(value) if value.is_meta else value
    if isinstance(value, dict):
        materialise(value)
    elif isinstance(value, list):
        value[:] = [_materialise(inner) for inner in value]
    elif type(value) is tuple:
        return tuple(_materialise(inner) for inner in value)
    return value


def empty_for_meta(value: torch.Tensor) -> torch.Tensor:
    """An empty tensor for a meta tensor, in the same layout."""
    if isinstance(value, ShardedTensor):
        raise CheckpointMismatchError("a ShardedTensor on the meta device cannot be loaded to")
    if not isinstance(value, DTensor):
        empty = torch.empty_like(value, device=current_device(group_device_type()))
        return declare_parts(empty, declarations_of(value))
    mesh = value.device_mesh
    local = torch.empty_like(local_tensor(value), device=current_device(mesh.device_type))
    # Shape and stride are given explicitly: they do not follow from an uneven shard.
    return DTensor.from_local(
        local, mesh, value.placements, shape=value.size(), stride=value.stride()
    )


def group_device_type() -> str:
    """The device type that the default group's tensors are on."""
    if not dist.is_initialized():
        return "cpu"
    kinds = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    return "cpu" if "cpu" in kinds else kinds[0]


def current_device(device_type: str) -> torch.device:
    """This rank's current device of the type."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())
