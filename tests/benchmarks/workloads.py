"""The work of every timed world once it is up: the same few lines for the peers and for us.

Each workload takes the world's one-dimensional mesh, runs on every rank, and raises where a value
is wrong. Ours run them as pytest tests, the peers as plain functions.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def all_reduce(mesh: DeviceMesh) -> None:
    """One all-reduce of four numbers."""
    tensor = torch.full((4,), mesh.get_rank() + 1.0)
    dist.all_reduce(tensor)
    size = dist.get_world_size()
    assert size == mesh.size()
    assert tensor.tolist() == [size * (size + 1) / 2] * 4


def dtensor(mesh: DeviceMesh) -> None:
    """A tensor is sharded over the mesh, then gathered on every rank."""
    full = torch.arange(64.0).reshape(8, 8)
    sharded = distribute_tensor(full, mesh, [Shard(0)])
    assert sharded.to_local().numel() == 64 // mesh.size()
    assert torch.equal(sharded.redistribute(mesh, [Replicate()]).to_local(), full)


def fsdp2(mesh: DeviceMesh) -> None:
    """A small model under FSDP2, one forward and one backward."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


WORKLOADS: dict[str, Callable[[DeviceMesh], None]] = {
    "all_reduce": all_reduce,
    "dtensor": dtensor,
    "fsdp2": fsdp2,
}
