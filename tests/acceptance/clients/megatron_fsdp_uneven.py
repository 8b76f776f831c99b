"""Megatron-FSDP: its DTensors whose parts say themselves where they lie, cut as no Shard cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed.checkpoint as dcp
from megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

ROWS = 13


def cut(mesh: DeviceMesh, first: int, factor: float) -> DTensor:
    """Rank 0 has the rows up to `first`, rank 1 the others."""
    whole = torch.arange(float(ROWS * 3)).reshape(ROWS, 3) * factor
    local = whole[first:] if dist.get_rank() else whole[:first]
    return DTensor.from_local(
        local.clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=(3, 1)
    )


def state_of(mesh: DeviceMesh, first: int, factor: float) -> dict[str, Any]:
    """One part is empty in `nothing`."""
    tensors = {"w": cut(mesh, first, factor), "nothing": cut(mesh, 0, factor)}
    state = {"model": tensors, "optimizer": {"w": {"step": factor, "average": cut(mesh, 2, 2.0)}}}
    found: dict[str, Any] = preprocess_state_dict_for_uneven_dtensor(state)
    return found


def digest(state: dict[str, Any]) -> str:
    """Of the full tensors: the layouts differ. (The package's own gathering needs NCCL.)"""
    tensors = [*state["model"].values(), state["optimizer"]["w"]["average"]]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [tensor.to_local() for tensor in tensors])
    whole = [torch.cat(of) for of in zip(*parts, strict=True)]
    return measure.digest([*whole, state["optimizer"]["w"]["step"]])


def program(mode: str, folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    saved = state_of(mesh, 9, 1.0)
    found = {}
    for how in ("waiting", "background"):
        state = saved
        if mode == "resume":
            state = state_of(mesh, 4, 0.5)
            dcp.load(state, checkpoint_id=folder / how)
        elif how == "waiting":
            dcp.save(state, checkpoint_id=folder / how)
        else:
            dcp.async_save(state, checkpoint_id=folder / how).result()  # type: ignore[union-attr]
        found[how] = digest(state)
    return found


if __name__ == "__main__":
    measure.run(program)
