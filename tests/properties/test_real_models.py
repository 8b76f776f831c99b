"""Models that others wrote: built from configurations, divided, saved, loaded, trained on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import pytest_dcp.properties as props
from pytest_dcp.properties import MeshSpec, ModuleRun
from support.unsynced import UNSYNCED

pytest.importorskip("transformers", reason="the extra `models` is not installed")
transformers: Any = importlib.import_module("transformers")

WORDS = 40


def llama() -> nn.Module:
    """Separate head, grouped keys, rotary buffers that are not saved."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]  # untyped


def gpt2() -> nn.Module:
    """The head's weight is the embedding's."""
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]  # untyped


def mixtral() -> nn.Module:
    """A mixture of experts, of which each word reaches two."""
    config = transformers.MixtralConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return transformers.MixtralForCausalLM(config)  # type: ignore[no-any-return]  # untyped


LLAMA_TP: dict[str, type[ParallelStyle]] = {
    "inner.model.layers.*.mlp.gate_proj": ColwiseParallel,
    "inner.model.layers.*.mlp.up_proj": ColwiseParallel,
    "inner.model.layers.*.mlp.down_proj": RowwiseParallel,
}


def batch(step: int) -> torch.Tensor:
    return torch.randint(WORDS, (2, 5), generator=torch.Generator().manual_seed(step))


class Model(nn.Module):
    """A model that gives its scores alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.inner(words).logits
        return scores


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A `Placed` and `Trainable` model of the transformers package."""

    make: Callable[[], nn.Module]
    mesh: MeshSpec = MeshSpec()  # noqa: RUF009  # frozen
    """Dimensions named "shard" and "tp"; without names the model is left plain."""
    seed: int = 0

    @property
    def world_size(self) -> int:
        return self.mesh.size

    @property
    def meshes(self) -> tuple[MeshSpec, ...]:
        return (self.mesh,) if self.mesh.dim_names else ()

    def full(self) -> dict[str, Any]:
        return dict(self.whole().state_dict())

    def whole(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Model(self.make().to(torch.float64))

    def divided(self) -> nn.Module:
        module = self.whole()
        if not self.mesh.dim_names:
            return module
        mesh = self.mesh.build()
        if "tp" in self.mesh.dim_names:
            parallelize_module(module, mesh["tp"], {n: style() for n, style in LLAMA_TP.items()})
        if "shard" in self.mesh.dim_names:
            for layer in layers_of(module):
                fully_shard(layer, mesh=mesh["shard"])
            fully_shard(module, mesh=mesh["shard"])
        return module

    def state(self, device: str | None = None) -> dict[str, Any]:
        module = self.divided()
        return dict((module if device is None else module.to(device)).state_dict())

    def start(self, *, fresh: bool) -> ModuleRun:
        module = (replace(self, seed=self.seed + 1) if fresh else self).divided()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, foreach=False)
        return ModuleRun(module, optimizer, batch)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The decoder's blocks."""
    return [one for name, one in module.named_modules() if name.split(".")[-1].isdigit()][:2]


FSDP = MeshSpec((4,), ("shard",))
TP = MeshSpec((2,), ("tp",))
BOTH = MeshSpec((2, 2), ("shard", "tp"))
PLAIN = MeshSpec()
MOVES = {
    "llama": (llama, [(TP, FSDP), (FSDP, BOTH), (BOTH, PLAIN), (PLAIN, TP)]),
    "gpt2": (gpt2, [(FSDP, PLAIN), (PLAIN, FSDP), (FSDP, FSDP)]),
    "mixtral": (mixtral, [(FSDP, PLAIN), (PLAIN, FSDP)]),
}


@pytest.mark.world_size(4, isolation="module")
@pytest.mark.parametrize("name", MOVES)
class TestModels:
    def test_is_loaded_in_any_division(self, name: str, checkpoint_dir: Path) -> None:
        make, moves = MOVES[name]
        for number, (one, other) in enumerate(moves):
            saved, loaded = PlacedModel(make, one), PlacedModel(make, other)
            props.assert_round_trip(saved, loaded, checkpoint_dir / str(number), dcp=UNSYNCED)

    def test_is_filled_on_the_meta_device(self, name: str, checkpoint_dir: Path) -> None:
        make, moves = MOVES[name]
        saved, loaded = (PlacedModel(make, mesh) for mesh in moves[0])
        props.assert_meta_load(saved, loaded, checkpoint_dir, dcp=UNSYNCED)

    def test_training_goes_on(self, name: str, checkpoint_dir: Path) -> None:
        make, moves = MOVES[name]
        for number, (one, other) in enumerate(moves):
            saved, loaded = PlacedModel(make, one), PlacedModel(make, other)
            props.assert_training_resumes(saved, loaded, checkpoint_dir / str(number), dcp=UNSYNCED)
