"""Assemble a sharded state by plain indexing, to compare the results of two worlds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pytest_dcp.properties.bits import Bits, bits_of, tensor_of
from pytest_dcp.properties.placed import flat, local_of
from pytest_dcp.properties.placements import Places, places_of
from pytest_dcp.properties.subworlds import agree, first_ranks, rank

Parts = dict[str, tuple[Places, Bits]]


def whole(state: dict[str, Any], count: int) -> dict[str, Any]:
    """On rank 0 the state by flat names, with whole tensors on the CPU; empty elsewhere.

    Collective over the first `count` ranks.
    """
    entries = dict(flat(state))
    parts = agree("parts of the state", first_ranks(count), lambda: _parts(entries))
    parts_by_rank: list[Parts] = [parts]
    if dist.is_initialized():
        gathered: Any = [None] * count if rank() == 0 else None
        dist.gather_object(parts, gathered, dst=0, group=first_ranks(count))
        parts_by_rank = gathered
    if rank():
        return {}
    return {fqn: _assemble_value(fqn, value, parts_by_rank) for fqn, value in entries.items()}


def _parts(entries: dict[str, Any]) -> Parts:
    return {fqn: _part(value) for fqn, value in entries.items() if isinstance(value, DTensor)}


def _assemble_value(fqn: str, value: Any, parts_by_rank: list[Parts]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, DTensor):
        return value.detach().cpu().clone()
    bits = np.zeros((*value.shape, value.dtype.itemsize), dtype=np.uint8)
    for parts in parts_by_rank:
        places, part = parts[fqn]
        bits[np.ix_(*places)] = part
    return tensor_of(bits, value.dtype)


def _part(tensor: DTensor) -> tuple[Places, Bits]:
    mesh, local = tensor.device_mesh, local_of(tensor)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"this rank is not in {mesh!r} of the tensor that it was asked for")
    places = places_of(tensor.shape, mesh.shape, coordinate, tensor.placements)
    return places, bits_of(local).reshape(*(len(some) for some in places), local.dtype.itemsize)
