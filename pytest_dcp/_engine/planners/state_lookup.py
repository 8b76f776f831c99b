"""Lookups in state dicts, for planners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from pytest_dcp._engine.plan.shards import shard_at

__all__ = ["find_tensor_shard", "find_state_dict_object"]


def find_tensor_shard(tensor: torch.Tensor, index: MetadataIndex) -> torch.Tensor:
    """This rank's memory of the box of the tensor at `index.offset`.

    Raises ValueError, in torch's words, when the rank holds no box there.
    """
    return shard_at(tensor, index)


def find_state_dict_object(state_dict: Mapping[str, Any], index: MetadataIndex) -> Any:
    """The value, or this rank's memory of the box, that the index names in a flat state dict.

    Raises ValueError, in torch's words, when there is none.
    """
    if index.fqn not in state_dict:
        raise ValueError(f"Could not find FQN: '{index.fqn}'")
    value = state_dict[index.fqn]
    if isinstance(value, torch.Tensor):
        return find_tensor_shard(value, index)
    if index.offset is not None:
        raise ValueError(
            f"FQN: '{index.fqn}' is not a ShardedTensor, can't find by offset: '{index.offset}'"
        )
    return value
