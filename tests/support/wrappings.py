"""A model, the ways in which people wrap and shard it, and the oracle: the same model, bare.

Every rank trains on the same batch, so that averaged gradients equal those of one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed._composable import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

Way = Callable[[torch.nn.Module], torch.nn.Module]

FEATURES = 5


class Block(torch.nn.Module):
    """Few of its sizes can be divided by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(FEATURES, 8)
        self.down = torch.nn.Linear(8, FEATURES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Net(torch.nn.Module):
    """Two blocks, a child called `module`, buffers of both kinds."""

    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = Block()
        self.second = Block()
        self.module = torch.nn.Linear(FEATURES, 3)
        self.register_buffer("scale", torch.tensor([0.5, 1.5, float(seed)]))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(self.second(self.first(x))) * self.scale
        return out


def plain(model: torch.nn.Module) -> torch.nn.Module:
    return model


def ddp(model: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(model)


def replicated(model: torch.nn.Module) -> torch.nn.Module:
    replicate(model)  # type: ignore[operator]  # torch types it as a module
    return model


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    """Compiled, with a part that is compiled by itself. The tests do not run it."""
    model.first = torch.compile(model.first, backend="eager")
    return torch.compile(model, backend="eager")  # type: ignore[return-value]  # is a module


def compiled_ddp(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(ddp(checkpointed(model)), backend="eager")  # type: ignore[return-value]


def ddp_of_compiled(model: torch.nn.Module) -> torch.nn.Module:
    return ddp(compiled(model))


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    model.first = checkpoint_wrapper(model.first)
    model.second.up = checkpoint_wrapper(model.second.up)  # type: ignore[union-attr]
    return model


def _fsdp1(
    model: torch.nn.Module,
    *,
    use_orig_params: bool = True,
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD,
    **more: Any,
) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
        **more,
    )


def fsdp1(model: torch.nn.Module) -> torch.nn.Module:
    model.first = _fsdp1(model.first)
    return _fsdp1(model)


def fsdp1_flat(model: torch.nn.Module) -> torch.nn.Module:
    model.first = _fsdp1(model.first, use_orig_params=False)
    return _fsdp1(model, use_orig_params=False)


def fsdp1_unsharded(model: torch.nn.Module) -> torch.nn.Module:
    return _fsdp1(model, strategy=ShardingStrategy.NO_SHARD)


def fsdp1_hybrid(model: torch.nn.Module) -> torch.nn.Module:
    """With a mesh, FSDP1's state dicts hold DTensors instead of ShardedTensors."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return _fsdp1(model, strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def fsdp1_below(model: torch.nn.Module) -> torch.nn.Module:
    """In a model that is not in FSDP1 itself, below activation checkpoints and above them."""
    model.first = checkpoint_wrapper(_fsdp1(model.first, use_orig_params=False))
    model.second = _fsdp1(checkpoint_wrapper(model.second), use_orig_params=False)
    return model


def fsdp1_compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(fsdp1(model), backend="eager")  # type: ignore[return-value]


def fsdp2(model: torch.nn.Module) -> torch.nn.Module:
    fully_shard(model.first)
    return fully_shard(model)


def fsdp2_checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    return fsdp2(checkpointed(model))


def hsdp(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


TP = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (4,))
    parallelize_module(model.first, mesh, copy.deepcopy(TP))  # type: ignore[arg-type]
    return model


def fsdp2_tp(model: torch.nn.Module) -> torch.nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for block in (model.first, model.second):
        parallelize_module(block, mesh["tp"], copy.deepcopy(TP))  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def fsdp2_compiled(model: torch.nn.Module) -> torch.nn.Module:
    model.second = torch.compile(model.second, backend="eager")
    return torch.compile(fsdp2(model), backend="eager")  # type: ignore[return-value]


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        plain,
        ddp,
        replicated,
        checkpointed,
        fsdp1,
        fsdp1_flat,
        fsdp1_unsharded,
        fsdp1_hybrid,
        fsdp1_below,
        fsdp2,
        fsdp2_checkpointed,
        hsdp,
        tensor_parallel,
        fsdp2_tp,
    )
}
COMPILED_WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (compiled, compiled_ddp, ddp_of_compiled, fsdp1_compiled, fsdp2_compiled)
}


def adamw(model: torch.nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its compiled wrapper, to be run: the parameters are the same."""
    return getattr(model, "_orig_mod", model)


def train(
    model: torch.nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 1
) -> list[float]:
    """The loss before each step, the same on every rank for the same model."""
    batch = torch.linspace(-1, 1, 4 * FEATURES).reshape(4, FEATURES)
    losses = []
    for _ in range(steps):
        loss = uncompiled(model)(batch).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A bare model's optimizer state: torch's own, with names for numbers. The oracle."""
    packed = copy.deepcopy(optimizer.state_dict())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ids: dict[int, str] = {}
    for group, own in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        ids |= {n: names[id(p)] for n, p in zip(group["params"], own["params"], strict=True)}
        group["params"] = [ids[n] for n in group["params"]]
    packed["state"] = {ids[n]: state for n, state in packed["state"].items()}
    return packed


def close(actual: Any, expected: Any) -> None:
    """Fail unless both hold the same; groups may have their parameters in any order."""
    if isinstance(expected, dict) and "params" in expected:
        assert sorted(actual["params"]) == sorted(expected["params"])
        actual = {key: value for key, value in actual.items() if key != "params"}
        expected = {key: value for key, value in expected.items() if key != "params"}
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            close(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            close(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        assert actual == expected
