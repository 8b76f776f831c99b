"""Lightning's Trainer: `ModelParallelStrategy` with FSDP2, its callbacks and schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import measure
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = measure.make_model()
        self.seen: list[str] = []

    def configure_model(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        return self.model(batch[0]).square().mean()

    def digest(self) -> str:
        states = [self.model.state_dict(), self.trainer.optimizers[0].state_dict()]
        return measure.digest(
            [*states, self.trainer.lr_scheduler_configs[0].scheduler.state_dict()]
        )

    def on_train_start(self) -> None:
        self.seen.append(self.digest())


def program(mode: str, folder: Path) -> dict[str, Any]:
    data = torch.randn(16, 7, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(data), batch_size=4)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=1 if mode == "save" else 2,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="last")] if mode == "save" else [],
        enable_checkpointing=mode == "save",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=None if mode == "save" else folder / "last.ckpt")
    if mode == "save":
        return {"state": module.digest(), "epoch": trainer.current_epoch}
    return {"state": module.seen[0], "continued": module.digest(), "steps": trainer.global_step}


if __name__ == "__main__":
    measure.run(program)
