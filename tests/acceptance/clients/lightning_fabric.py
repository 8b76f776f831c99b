"""Lightning Fabric: `ModelParallelStrategy` with FSDP2, a folder of shards, and their merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def program(mode: str, folder: Path) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        parallelize_fn=shard, data_parallel_size=2, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup(measure.make_model())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.1))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    found: dict[str, Any] = {}

    def digest() -> str:
        return measure.digest([model.state_dict(), optimizer.state_dict()])

    if mode == "save":
        measure.train(model, optimizer, first_step=0, backward=fabric.backward)
        state["step"] = 2
        fabric.save(folder, state)
        whole = _load_distributed_checkpoint(folder)
        found["whole"] = measure.digest([whole["model"], whole["step"]])
    else:
        fabric.load(folder, state)
    found["step"] = state["step"]
    found["state"] = digest()
    measure.train(model, optimizer, first_step=2, backward=fabric.backward)
    found["continued"] = digest()
    return found


if __name__ == "__main__":
    measure.run(program)
