"""TorchTNT: the callback `DistributedCheckpointSaver` with its fsspec writer, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torchtnt.framework.callbacks.dcp_saver import DistributedCheckpointSaver
from torchtnt.framework.state import State
from torchtnt.framework.train import train
from torchtnt.framework.unit import TrainUnit


class Unit(TrainUnit[torch.Tensor]):
    def __init__(self) -> None:
        super().__init__()
        self.model = measure.make_model()
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)

    def train_step(self, state: State, data: torch.Tensor) -> None:
        self.model(data).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def digest(self) -> str:
        parts = [self.model, self.optimizer, self.scheduler, self.train_progress]
        return measure.digest([part.state_dict() for part in parts])


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(4, 7, generator=generator) for _ in range(count)]


def program(mode: str, folder: Path) -> dict[str, Any]:
    found = {}
    for how in ("waiting", "background"):
        unit = Unit()
        if mode == "save":
            saver = DistributedCheckpointSaver(
                str(folder / how), save_every_n_train_steps=2, async_checkpoint=how == "background"
            )
            train(unit, batches(2), max_epochs=1, callbacks=[saver])
        else:
            (saved,) = (folder / how).glob("epoch_0_train_step_2*")
            DistributedCheckpointSaver.restore(str(saved), unit)
        found[f"{how} model"] = measure.digest(
            [unit.model.state_dict(), unit.optimizer.state_dict(), unit.scheduler.state_dict()]
        )
        train(unit, batches(4), max_epochs=1, max_steps_per_epoch=2)
        found[f"{how} continued"] = unit.digest()
    return found


if __name__ == "__main__":
    measure.run(program)
