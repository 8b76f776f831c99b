"""Transformers: sharded safetensors of a model, its optimizer, and the consolidated file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    _save_model_checkpoint_distributed,
    consolidate_distributed_checkpoint,
    load_optimizer_distributed,
    save_optimizer_distributed,
)


def train(model: Any, optimizer: torch.optim.Optimizer, *, first_step: int) -> None:
    for step in (first_step, first_step + 1):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(64, (2, 8), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def program(mode: str, folder: Path) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = {}
    if mode == "save":
        train(model, optimizer, first_step=0)
        _save_model_checkpoint_distributed(model, str(folder / "model"))
        save_optimizer_distributed(model, optimizer, str(folder / "optimizer"))
        if dist.get_rank() == 0:
            consolidate_distributed_checkpoint(str(folder / "model"), str(folder / "whole"))
        dist.barrier()
        files = sorted((folder / "whole").glob("*.safetensors"))
        found["whole"] = measure.digest([sorted(load_file(file).items()) for file in files])
    else:
        _load_model_checkpoint_distributed(model, str(folder / "model"))
        load_optimizer_distributed(model, optimizer, str(folder / "optimizer"))
    found["state"] = measure.digest([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, first_step=2)
    found["continued"] = measure.digest([model.state_dict(), optimizer.state_dict()])
    return found


if __name__ == "__main__":
    measure.run(program)
