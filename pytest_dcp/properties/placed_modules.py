"""A module, and optionally its optimizer, divided by a plan: a state that laws save and load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pytest_dcp.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from pytest_dcp.properties.bits import memory_of
from pytest_dcp.properties.meshes import MeshSpec
from pytest_dcp.properties.modules import ModuleSpec
from pytest_dcp.properties.optimizers import OptimizerSpec
from pytest_dcp.properties.parallel import PLAIN, ParallelPlan
from pytest_dcp.properties.placed import local_of
from pytest_dcp.properties.placements import part_of, places_of
from pytest_dcp.properties.tensors import TensorSpec

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Parameter groups are numbered differently in each layout; names stay the same."""


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """A `Placed` state dict of a module's parameters and buffers, and of its optimizer's state."""

    module: ModuleSpec
    plan: ParallelPlan = PLAIN
    optimizer: OptimizerSpec | None = None

    @property
    def world_size(self) -> int:
        return self.plan.mesh.size

    @property
    def meshes(self) -> tuple[MeshSpec, ...]:
        return (self.plan.mesh,) if self.plan.mesh.dim_names else ()

    def full(self) -> dict[str, Any]:
        module = self.module.build()
        state: dict[str, Any] = {"model": dict(module.state_dict())}
        if self.optimizer is not None:
            entries = optimizer_state(module, self.optimizer.build(module))
            state["optim"] = {
                fqn: _content(fqn, value).build() if isinstance(value, torch.Tensor) else value
                for fqn, value in entries.items()
            }
        return state

    def state(self, device: str | None = None) -> dict[str, Any]:
        module = self.plan.apply(self.module, device)
        state: dict[str, Any] = {"model": dict(module.state_dict())}
        if self.optimizer is not None:
            state["optim"] = optimizer_state(module, self.optimizer.build(module))
            for fqn, value in state["optim"].items():
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    _fill(value, _content(fqn, value))
        return state

    def start(self, *, fresh: bool) -> ModuleRun:
        """A run at its first step; with `fresh`, its parameters differ from the usual
        initial ones.
        """
        if self.optimizer is None:
            raise ValueError(f"expected a PlacedModule with an optimizer to train, got {self!r}")
        spec = replace(self.module, seed=self.module.seed + 1) if fresh else self.module
        module = self.plan.apply(spec)
        return ModuleRun(module, self.optimizer.build(module), spec.batch)


@dataclass(frozen=True, slots=True)
class ModuleRun:
    """This rank's part of a module's training by one optimizer."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], torch.Tensor]
    """The input of a step, the same on every rank."""

    def train(self, first: int, last: int) -> None:
        """Take the steps first to last - 1."""
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.module(self.batch(step)).square().mean().backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Model and optimizer, by flat names."""
        model = dict(self.module.state_dict())
        return {"model": model, "optim": optimizer_state(self.module, self.optimizer)}

    def take(self, state: dict[str, Any]) -> None:
        """Continue from this state."""
        self.module.load_state_dict(state["model"])
        set_optimizer_state_dict(self.module, self.optimizer, state["optim"], options=FLAT)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict by flat names: groups are named by the parameters in them."""
    state = get_optimizer_state_dict(module, optimizer, options=FLAT)
    return dict(state)


def _content(fqn: str, like: torch.Tensor) -> TensorSpec:
    """Content of an optimizer's tensor: arbitrary bits that depend only on its name."""
    return TensorSpec(tuple(like.shape), like.dtype, "random", crc32(fqn.encode()))


def _fill(tensor: torch.Tensor, content: TensorSpec) -> None:
    """Write this rank's part of the content."""
    bits, local = content.bits(), local_of(tensor)
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            return
        bits = part_of(bits, places_of(tensor.shape, mesh.shape, coordinate, tensor.placements))
    memory_of(local).copy_(torch.from_numpy(bits).reshape(memory_of(local).shape))
