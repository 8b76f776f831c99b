"""Any module, optimizer, layout and wrapper into any other: training goes on as if undivided."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import pytest_dcp.properties as props
from pytest_dcp.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from pytest_dcp.properties.parallel import PLAIN

WORLD = 4
EXAMPLES = settings().max_examples


@dataclass(frozen=True, slots=True)
class Run:
    """A module and its optimizer, divided and wrapped in one way."""

    module: props.ModuleSpec
    optimizer: props.OptimizerSpec
    plan: props.ParallelPlan
    checkpointed: bool
    """Whether each child is in an activation checkpoint."""
    ddp: bool

    def build(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = self.plan.apply(self.module)
        optimizer = self.optimizer.build(model)
        if self.checkpointed:
            for name, child in model.named_children():
                setattr(model, name, checkpoint_wrapper(child))
        return DistributedDataParallel(model) if self.ddp else model, optimizer


@st.composite
def runs(draw: st.DrawFn, module: props.ModuleSpec, optimizer: props.OptimizerSpec) -> Run:
    """A run in the whole world, or the same on each rank alone."""
    plans = props.any_plans(module, world_size=WORLD)
    plan = draw(plans.filter(lambda p: p == PLAIN or p.mesh.size == WORLD))
    ddp = plan == PLAIN and module.kind != "tied" and draw(st.booleans())
    return Run(module, optimizer, plan, draw(st.booleans()), ddp)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Run, Run]:
    """The same module and optimizer in two ways; the second with other values to begin with."""
    module = draw(props.modules(min_width=WORLD))
    optimizer = draw(props.optimizers())
    other = replace(module, seed=module.seed + 1)
    return draw(runs(module, optimizer)), draw(runs(other, optimizer))


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, spec: props.ModuleSpec, *steps: int
) -> list[float]:
    losses = []
    for step in steps:
        loss = model(spec.batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.world_size(WORLD)
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=max(EXAMPLES // 5, 1), deadline=None)
@given(pair=pairs(), flat=st.booleans(), from_rank0=st.booleans(), stepped=st.booleans())
def test_training_goes_on_as_if_undivided(
    pair: tuple[Run, Run], flat: bool, from_rank0: bool, stepped: bool
) -> None:
    one, other = pair
    before = (1, 2) if stepped else ()
    bare = one.module.build()
    bare_optimizer = one.optimizer.build(bare)
    train(bare, bare_optimizer, one.module, *before)
    expected = train(bare, bare_optimizer, one.module, 3, 4)

    model, optimizer = one.build()
    train(model, optimizer, one.module, *before)
    getting, setting = StateDictOptions(full_state_dict=True), StateDictOptions()
    if from_rank0:
        getting.cpu_offload = True
        setting.full_state_dict = setting.broadcast_from_rank0 = True
    getting.flatten_optimizer_state_dict = setting.flatten_optimizer_state_dict = flat
    states: Any = copy.deepcopy(get_state_dict(model, optimizer, options=getting))
    assert bool(states[0]) == (not from_rank0 or dist.get_rank() == 0)

    model, optimizer = other.build()
    set_state_dict(
        model, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=setting
    )
    assert train(model, optimizer, one.module, 3, 4) == pytest.approx(expected, rel=1e-6)
