"""Models in FullyShardedDataParallel, through its public state-dict functions.

FSDP1 flattens parameters, so the states of model and optimizer are not stored under their names.
Everything here is collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.optim import Optimizer

from pytest_dcp._engine.state_dicts.scope import Scope


@contextmanager
def states(scope: Scope) -> Iterator[None]:
    """Make the model's state dicts sharded, within the block; changes nothing without FSDP1.

    Whole tensors are gathered from these, one at a time: FSDP1 itself would gather a whole module
    at once, and offloading it frees memory of a model that is on the CPU.
    """
    if not scope.in_fsdp1:
        yield
        return
    for module in scope.in_fsdp1:
        # Before its first forward a model has no root yet, which optimizer states need.
        module.check_is_root()
    with FullyShardedDataParallel.state_dict_type(
        scope.model,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=False),
        ShardedOptimStateDictConfig(offload_to_cpu=False),
    ):
        yield


def name_own_state(
    model: nn.Module, optimizer: Optimizer, packed: dict[str, Any]
) -> dict[str, Any]:
    """An optimizer's own state dict, keyed by FSDP's names of the original parameters."""
    state = FullyShardedDataParallel.optim_state_dict(model, optimizer, packed)
    for entries in state["state"].values():
        # Parameters that are flattened together have one step count, the same object.
        entries |= {k: v.clone() for k, v in entries.items() if _is_scalar(v)}
    return state


def pack_own_state(
    model: nn.Module, optimizer: Optimizer, state_by_name: dict[str, Any]
) -> dict[str, Any]:
    """The input of `name_own_state`: the state that the optimizer itself loads."""
    return FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state_by_name)


def _is_scalar(value: Any) -> bool:
    return type(value) is torch.Tensor and not value.ndim
