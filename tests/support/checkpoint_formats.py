"""One state as a checkpoint of each format that the engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pytest_dcp.checkpoint as dcp
from support.states import torch_dcp

VALUES = {"step": 7, "lr": [0.1, 0.2], "name": "run"}
"""Beside the tensors, in the formats that hold values."""


def nest_model(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The state dict whose flat names are those of the tensors, `model.` first, and of `VALUES`."""
    model = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {"model": model, **VALUES}


def save_in_each_format(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Save as `ours`, `torchs`, `state.pt`, `one.safetensors` and `hf`, which has three files."""
    state = nest_model(tensors)
    dcp.save(state, checkpoint_id=folder / "ours")
    torch_dcp.save(state, checkpoint_id=folder / "torchs")
    torch.save(state, folder / "state.pt")
    save_file(tensors, folder / "one.safetensors")
    numbers = {name: 1 + n % 3 for n, name in enumerate(tensors)}
    writer = dcp.HuggingFaceStorageWriter(str(folder / "hf"), fqn_to_index_mapping=numbers)
    dcp.save(dict(tensors), storage_writer=writer)
    return folder
