"""A sharded repository of a model, as transformers writes it, into models that are divided."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import pytest_dcp.checkpoint as dcp

pytest.importorskip("transformers", reason="the extra `models` is not installed")
transformers: Any = importlib.import_module("transformers")


def make_model() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model


@pytest.fixture
def repository(tmp_path_factory: pytest.TempPathFactory, rank: int, world: Any) -> Path:
    """A folder with several files and their index, which rank 0 writes."""
    folder = None
    if rank == 0:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("repository")
        make_model().save_pretrained(folder, max_shard_size="8KB")  # type: ignore[operator]  # transformers'
        assert len(list(folder.glob("*.safetensors"))) > 1
    found: Path = world.broadcast(folder)
    return found


def divide_fully(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.model.layers:  # type: ignore[union-attr]  # transformers'
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]  # a module
    fully_shard(model, mesh=mesh)


def divide_tensors(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }
    plan |= {
        pattern.replace("[qkv]", letter): style
        for pattern, style in plan.items()
        if "[qkv]" in pattern
        for letter in "qkv"
    }
    parallelize_module(model, mesh, {k: v for k, v in plan.items() if "[" not in k})


@pytest.mark.world_size(2)
@pytest.mark.parametrize("divide", [divide_fully, divide_tensors])
@pytest.mark.parametrize("on_meta", [False, True])
def test_a_divided_model_takes_its_parts_of_the_repository(
    repository: Path, device_mesh: DeviceMesh, divide: Any, on_meta: bool
) -> None:
    with torch.device("meta" if on_meta else "cpu"):
        model = make_model()
    divide(model, device_mesh)
    if on_meta:
        model.to_empty(device="cpu")
    state = model.state_dict()
    assert any(isinstance(value, DTensor) for value in state.values())
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(repository)))
    with dcp.open(repository) as opened:
        assert opened.keys() == state.keys()
        for name, whole in opened.read(opened).items():
            mine = state[name]
            full = mine.full_tensor() if isinstance(mine, DTensor) else mine
            assert torch.equal(full, whole), name
