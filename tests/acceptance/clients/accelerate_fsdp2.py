"""Accelerate: the functions that save, load and merge the state of FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import (
    load_fsdp_model,
    load_fsdp_optimizer,
    merge_fsdp_weights,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard


def program(mode: str, folder: Path) -> dict[str, Any]:
    # Accelerate refuses FSDP on CPUs, so the model is sharded here; the functions are those that
    # its save_state and load_state call.
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = Accelerator(cpu=True)
    model = measure.make_model()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = {}
    if mode == "save":
        measure.train(model, optimizer, first_step=0)
        folder.mkdir(exist_ok=True)
        save_fsdp_model(plugin, accelerator, model, str(folder))
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
        merge_fsdp_weights(str(folder / "pytorch_model_fsdp_0"), str(folder / "merged"))
        accelerator.wait_for_everyone()
        found["merged"] = measure.digest(load_file(folder / "merged" / "model.safetensors"))
    else:
        load_fsdp_model(plugin, accelerator, model, str(folder))
        load_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    found["state"] = measure.digest([model.state_dict(), optimizer.state_dict()])
    measure.train(model, optimizer, first_step=2)
    found["continued"] = measure.digest([model.state_dict(), optimizer.state_dict()])
    return found


if __name__ == "__main__":
    measure.run(program)
