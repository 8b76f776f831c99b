"""Every way to wrap and shard a model: the same state dict, and into every other way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from support.wrappings import COMPILED_WAYS, WAYS, Net, Way, adamw, by_name, close, plain, train

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Torch warns of its own use of its other parts, in FSDP1 most of all.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FULL = StateDictOptions(full_state_dict=True)


def trained(way: Any, steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = way(Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=steps)
    return model, optimizer


EVERY = WAYS | COMPILED_WAYS


@pytest.mark.parametrize("way", EVERY)
def test_the_state_is_the_bare_models(way: str) -> None:
    bare, bare_optimizer = trained(plain)
    model, optimizer = trained(EVERY[way])
    expected = by_name(bare, bare_optimizer)
    state, optimizer_state = get_state_dict(model, optimizer, options=FULL)
    close(state, dict(bare.state_dict()))
    close(optimizer_state, expected)
    tensors = [id(v) for entries in optimizer_state["state"].values() for v in entries.values()]
    assert len(set(tensors)) == len(tensors), "two parameters share a state"
    state, optimizer_state = get_state_dict(model, optimizer)
    assert state.keys() == bare.state_dict().keys()
    assert optimizer_state["state"].keys() == expected["state"].keys()


@pytest.mark.parametrize("way", EVERY)
def test_training_goes_on_in_another_way(way: str, checkpoint_dir: Path) -> None:
    """Straight from whole tensors, and through a checkpoint of sharded ones."""
    model, optimizer = trained(EVERY[way])
    full = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=checkpoint_dir)
    losses = train(model, optimizer, steps=2)
    for other_way in others(way):
        other, other_optimizer = fresh(WAYS[other_way])
        load(other, other_optimizer, copy.deepcopy(full))
        assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-4), other_way
        other, other_optimizer = fresh(WAYS[other_way])
        state, optimizer_state = get_state_dict(other, other_optimizer)
        target = {"model": state, "optimizer": optimizer_state}
        dcp.load(target, checkpoint_id=checkpoint_dir)
        load(other, other_optimizer, (target["model"], target["optimizer"]))
        assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-4), other_way


def others(way: str) -> list[str]:
    """Itself, or nearly, and one more, so that all ways together meet each other widely."""
    names = list(WAYS)
    at = list(EVERY).index(way)
    return [names[(at + step) % len(names)] for step in (0, 3)]


def fresh(way: Way) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = way(Net(seed=7))
    return model, adamw(model, lr=0.7)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, states: Any) -> None:
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    assert optimizer.param_groups[0]["lr"] == 0.1
