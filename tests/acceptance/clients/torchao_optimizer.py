"""torchao: an 8-bit optimizer and quantised weights, which every rank holds whole.

`torchao_sharded` has the optimizers of a sharded model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torchao.optim import AdamW8bit
from torchao.quantization import Int8WeightOnlyConfig, quantize_

# Compiling its optimizer takes a minute, and changes nothing here.
torch.compile = lambda function, **_: function  # type: ignore[assignment,misc]


def flatten(value: Any) -> Any:
    """The inner tensors of wrapper subclasses, in nested dicts."""
    if isinstance(value, dict):
        return {name: flatten(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return {name: getattr(value, name) for name in names}
    return value


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, first_step: int) -> None:
    """Equal on all ranks, so that a model that is whole on each stays equal."""
    for step in (first_step, first_step + 1):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 128, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def program(mode: str, folder: Path) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    optimizer = AdamW8bit(model.parameters(), lr=0.1)
    quantised = nn.Linear(32, 32, bias=False)
    quantize_(quantised, Int8WeightOnlyConfig())
    if mode == "save":
        train(model, optimizer, first_step=0)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "quantised": quantised.state_dict()}
    if mode == "save":
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        quantised.load_state_dict(state["quantised"])
    found = {"quantised": measure.digest(flatten(quantised.state_dict()))}
    weights, states = get_state_dict(model, optimizer)
    found["state"] = measure.digest([flatten(weights), flatten(states)])
    train(model, optimizer, first_step=2)
    found["continued"] = measure.digest(flatten(model.state_dict()))
    return found


if __name__ == "__main__":
    measure.run(program)
