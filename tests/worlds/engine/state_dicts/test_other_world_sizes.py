"""State dicts of a world of one size in a world of another."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from support.wrappings import WAYS, Net, adamw, train

FULL = StateDictOptions(full_state_dict=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def quietly(function: Any, *args: Any) -> Any:
    """Runs the function; torch warns of its own use of its other parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def save(folder: Path, way: str) -> list[float]:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    full = get_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save(full, folder / "full.pt")
    return train(model, optimizer, steps=2)


def load(folder: Path, way: str) -> list[list[float]]:
    losses = []
    for whole in (True, False):
        model = WAYS[way](Net(seed=7))
        optimizer = adamw(model, lr=0.7)
        if whole:
            states = torch.load(folder / "full.pt", weights_only=True)
        else:
            states = get_state_dict(model, optimizer)
            target = {"model": states[0], "optimizer": states[1]}
            dcp.load(target, checkpoint_id=folder)
            states = target["model"], target["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
        losses.append(train(model, optimizer, steps=2))
    return losses


@pytest.mark.parametrize("way", ["ddp", "fsdp1", "fsdp2"])
def test_four_ranks_save_and_three_go_on(way: str, worlds: Any, tmp_path: Path) -> None:
    with worlds(4) as four:
        expected, *_ = four.run(quietly, save, tmp_path, way)
    with worlds(3) as three:
        for losses in three.run(quietly, load, tmp_path, way):
            assert losses == [pytest.approx(expected, rel=1e-4)] * 2
