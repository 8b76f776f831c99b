"""torchtitan: `CheckpointManager` with each of its modes of saving, and its HF export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, default_adamw


class Schedulers:
    """The part of LRSchedulersContainer that a checkpoint needs."""

    def __init__(self) -> None:
        self.last_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch = state["last_epoch"]


class TrainState(Schedulers):
    pass


class Adapter:
    """The part of a BaseStateDictAdapter that an export needs."""

    fqn_to_index_mapping = None

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {f"hf.{name}": value for name, value in state.items()}


class Trainer:
    """A model with its optimizers and its manager; one for each mode of saving."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.model: nn.Module = measure.make_model()
        fully_shard(self.model)
        config = default_adamw(lr=0.1)
        config.implementation = "for-loop"
        self.optimizers = OptimizersContainer(config, model_parts=[self.model])
        self.schedulers, self.state = Schedulers(), TrainState()
        self.manager = CheckpointManager(
            CheckpointManager.Config(
                enable=True,
                folder=str(folder / mode),
                interval=2,
                async_mode=mode,  # type: ignore[arg-type]
                keep_latest_k=0,
                initial_load_model_only=False,
                last_save_model_only=True,
                last_save_in_hf=True,
                export_dtype="float32",
            ),
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,  # type: ignore[arg-type]
            states={"train_state": self.state},
            sd_adapter=Adapter(),  # type: ignore[arg-type]
        )

    def digest(self) -> str:
        parts = [self.model, self.optimizers, self.schedulers, self.state]
        return measure.digest([part.state_dict() for part in parts])


def modes(mode: str, folder: Path) -> list[str]:
    """The ways of saving: torch's stager refuses the last one on a machine without accelerator."""
    pinned = folder / "async_with_pinned_mem"
    works = torch.accelerator.is_available() or not dcp.save.__module__.startswith("torch.")
    usable = pinned.exists() if mode == "resume" else works
    return ["disabled", "async", *([pinned.name] if usable else [])]


def program(mode: str, folder: Path) -> dict[str, Any]:
    found = {}
    for how in modes(mode, folder):
        trainer = Trainer(folder, how)
        if mode == "save":
            measure.train(trainer.model, trainer.optimizers, first_step=0)
            trainer.state.last_epoch = trainer.schedulers.last_epoch = 2
            trainer.manager.save(curr_step=2)
            found[f"{how} state"] = trainer.digest()
            trainer.manager.maybe_wait_for_staging()
        else:
            assert trainer.manager.load(step=2)
            found[f"{how} state"] = trainer.digest()
        measure.train(trainer.model, trainer.optimizers, first_step=2)
        found[f"{how} continued"] = trainer.digest()
        if mode == "save":
            trainer.manager.save(curr_step=4, last_step=True)
            dist.barrier()
            files = sorted((folder / how / "step-4").glob("*.safetensors"))
            found[f"{how} exported"] = measure.digest([sorted(load_file(f).items()) for f in files])
            assert files
        trainer.manager.close()
    return found


if __name__ == "__main__":
    measure.run(program)
