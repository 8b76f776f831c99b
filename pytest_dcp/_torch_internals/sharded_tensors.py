"""ShardedTensor and its parts, which FSDP1 puts in state dicts, and old checkpoints hold.

They can go when the package drops FSDP1, which torch has deprecated in favour of DTensor. None of
them was ever public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # State dicts hold these classes, and saves and loads must tell them apart from tensors.
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor, ShardedTensorBase

    # `.metadata` files pickle these two.
    from torch.distributed._shard.sharded_tensor.metadata import (
        MEM_FORMAT_ENCODING,
        TensorProperties,
    )
    from torch.distributed._shard.sharded_tensor.shard import Shard

    # FSDP1 lays its parameters out by chunks; by a list of shards, a tensor that is sent.
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec
    from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec

    # The type of a shard's placement; it says which rank has the shard.
    from torch.distributed.remote_device import _remote_device

TORCH.require_attributes(ShardedTensorBase, "_init_from_local_shards_and_global_metadata")
TORCH.require_attributes(ShardedTensor, "_init_from_local_shards_and_global_metadata")

__all__ = [
    "MEM_FORMAT_ENCODING",
    "ChunkShardingSpec",
    "EnumerableShardingSpec",
    "Shard",
    "ShardMetadata",
    "ShardedTensor",
    "ShardedTensorBase",
    "TensorProperties",
    "_remote_device",
    "group_of_sharded_tensor",
    "make_detached_sharded_tensor",
    "make_sharded_tensor_in_group",
]


def make_sharded_tensor_in_group(
    shards: Sequence[Shard], metadata: Any, group: dist.ProcessGroup | None
) -> ShardedTensor:
    """A ShardedTensor of this rank's shards and the metadata of all shards; not collective.

    The public `sharded_tensor.init_from_local_shards` gathers the metadata from all ranks, which
    have it already.
    """
    tensor: ShardedTensor = ShardedTensor._init_from_local_shards_and_global_metadata(
        list(shards), metadata, process_group=group
    )
    return tensor


def make_detached_sharded_tensor(
    shards: Sequence[Shard], metadata: Any, spec: Any
) -> ShardedTensor:
    """A ShardedTensor of these shards that needs no process group: it can be saved, no more."""
    base: Any = ShardedTensorBase._init_from_local_shards_and_global_metadata(
        list(shards), metadata, sharding_spec=spec
    )
    tensor: ShardedTensor = base
    return tensor


def group_of_sharded_tensor(tensor: ShardedTensor) -> dist.ProcessGroup:
    """The ranks that have its shards. torch has no public way to ask."""
    group: dist.ProcessGroup = tensor._process_group
    return group
