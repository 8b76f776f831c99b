"""Properties of DTensor and DeviceMesh that have no public access."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Arguments of DTensor's constructor: `from_local` would move the part to the mesh's device. Can
    # go when a public function makes a DTensor of a part on another device.
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # FSDP2 over tensor parallelism shards one dimension twice, and only this placement says in
    # which order. Can go when torch exports it beside Shard.
    from torch.distributed.tensor.placement_types import _StridedShard

TORCH.require_attributes(DTensor, "_local_tensor", "_spec")

__all__ = ["DTensorSpec", "TensorMeta", "_StridedShard", "forget_groups", "local_tensor", "spec_of"]

local_tensor: Callable[[DTensor], torch.Tensor] = attrgetter("_local_tensor")
"""The rank's own part of a DTensor, sharing its memory.

`to_local()` makes an autograd node and a view for each call, which costs more than all else that
planning does with a tensor; this can go when torch offers a plain accessor.
"""
spec_of: Callable[[DTensor], DTensorSpec] = attrgetter("_spec")
"""Mesh, placements, and the full tensor's shape and dtype, of a DTensor.

Each of the tensor's public attributes is a call through torch's dispatcher, as with `local_tensor`.
"""


def forget_groups(mesh: DeviceMesh) -> None:
    """Leave a mesh without process groups, in a process that has none.

    Its own `__setstate__` looks for the groups and warns of each that is missing; torch 2.10 has
    neither, so the attribute is not required. Can go when a mesh can be sent to such a process in
    public.
    """
    mesh._pg_registry = {}
