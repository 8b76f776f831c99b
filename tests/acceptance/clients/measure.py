"""For the programs of the clients: a small model, its training, digests to compare bit by bit."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

SEEDS = {"save": 1, "resume": 2}
"""Different: a resumed model is equal to the saved one only if all of it was loaded."""


def make_model() -> nn.Module:
    """Layers with rows that two ranks cannot split evenly, and a buffer that is equal on all."""
    model = nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 5, bias=False))
    model.register_buffer("scale", torch.rand(3, generator=torch.Generator().manual_seed(0)))
    return model


def train(
    model: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    first_step: int,
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
) -> None:
    """Two steps on data that only the step and the rank determine."""
    for step in (first_step, first_step + 1):
        generator = torch.Generator().manual_seed(100 * step + int(os.environ.get("RANK", "0")))
        loss = model(torch.randn(4, 7, generator=generator)).square().mean()
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def digest(tree: Any) -> str:
    """A digest of the paths, dtypes, shapes and bytes of this rank's tensors, and other values."""
    found = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(tree)[0]:
        local = leaf.to_local() if hasattr(leaf, "to_local") else leaf
        if isinstance(local, torch.Tensor):
            local = local.detach().cpu().contiguous()
            value = (str(local.dtype), tuple(local.shape), local.reshape(-1).view(torch.uint8))
            text = f"{value[:2]}{value[2].numpy().tobytes()!r}"
        else:
            text = repr(local)
        found.update(f"{path}{text}".encode())
    return found.hexdigest()[:16]


def run(program: Callable[[str, Path], dict[str, Any]]) -> None:
    """Run a program as `PROGRAM RESULTS MODE FOLDER [MODE FOLDER]...`, in each rank of torchrun.

    program: takes a mode (save or resume) and a folder, and returns results that JSON can hold.

    Writes the results of each mode, and the module of the engine's `save`, to the folder RESULTS.
    """
    results, *tasks = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found: dict[str, Any] = {"engine": dcp.save.__module__}
    for mode, folder in zip(tasks[::2], tasks[1::2], strict=True):
        torch.manual_seed(SEEDS[mode])
        found[f"{mode} {Path(folder).name}"] = program(mode, Path(folder))
        dist.barrier()
    Path(results, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
