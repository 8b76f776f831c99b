"""torchao's optimizers on FSDP2: a wrapper subclass in each DTensor of their states.

Saved sharded and whole; each is resumed in both layouts. A layer of 65 rows is cut where no block
ends: one rank's part is a plain tensor, the other's a wrapper, and only this layout can resume it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao_optimizer import train  # that module also keeps torchao from compiling

KINDS = (AdamW8bit, AdamW4bit, AdamWFp8)


def flatten(value: Any, *, gather: bool) -> Any:
    """The bytes of inner tensors of wrapper subclasses, in nested dicts; of all ranks with
    `gather`.
    """
    if isinstance(value, dict):
        return {name: flatten(item, gather=gather) for name, item in value.items()}
    local = value.to_local() if isinstance(value, DTensor) else value
    if not isinstance(local, torch.Tensor) or not hasattr(local, "__tensor_flatten__"):
        return value
    ours = {
        name: getattr(local, name).reshape(-1).view(torch.uint8)
        for name in local.__tensor_flatten__()[0]
    }
    if not gather or local is value:
        return ours
    # gloo knows no float8, so the tensors are not gathered as such.
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, ours)
    tables = {"qmap": ours["qmap"]} if "qmap" in ours else {}
    return {name: torch.cat([part[name] for part in parts]) for name in ours} | tables


def make(kind: Any, rows: int, *, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, rows, bias=False))
    if sharded:
        fully_shard(model)
    return model, kind(model.parameters(), lr=0.01)


def save(path: Path, kind: Any, rows: int, *, sharded: bool, gather: bool) -> str:
    """The digest of the state that was saved."""
    model, optimizer = make(kind, rows, sharded=sharded)
    train(model, optimizer, first_step=0)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=path)
    return measure.digest(flatten(state, gather=gather))


def resume(path: Path, kind: Any, rows: int, *, sharded: bool, gather: bool) -> str:
    """The digest of the state that an optimizer has after it was loaded."""
    model, optimizer = make(kind, rows, sharded=sharded)
    train(model, optimizer, first_step=7)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    found = measure.digest(flatten(get_optimizer_state_dict(model, optimizer), gather=gather))
    train(model, optimizer, first_step=2)
    return found


def program(mode: str, folder: Path) -> dict[str, Any]:
    # Ours saves a wrapper that is no part of a DTensor as a value, and torch's loads values whole.
    is_torch = dcp.save.__module__.startswith("torch.")
    stays_whole = is_torch and folder.name == "ours"
    found = {}
    for kind in KINDS:
        for saved in (True, False):
            key = f"{kind.__name__} {'sharded' if saved else 'whole'}"
            if mode == "save":
                found[key] = save(folder / key, kind, 128, sharded=saved, gather=True)
                continue
            layouts = [saved] if stays_whole and not saved else [True, False]
            ends = {resume(folder / key, kind, 128, sharded=s, gather=True) for s in layouts}
            assert len(ends) == 1
            (found[key],) = ends
        key = f"{kind.__name__} of mixed parts"
        turn = save if mode == "save" else resume
        found[key] = turn(folder / key, kind, 65, sharded=True, gather=False)
    return found


if __name__ == "__main__":
    measure.run(program)
