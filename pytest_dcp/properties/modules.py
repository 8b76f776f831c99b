"""Modules to draw: small trainable ones, each with a feature of some real models.

A `ModuleSpec` builds the same parameters in every process, and the same batch for each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import nn

Kind = Literal["mlp", "frozen", "buffers", "tied", "transformer", "convolution"]
"""mlp: two linear layers; frozen: the first of them takes no gradient; buffers: persistent and not;
tied: an embedding whose weight is also the head's; transformer: a block of attention and MLP;
convolution: a convolution and a normalisation that counts batches.
"""

WORDS = 11
"""Size of the vocabulary: uneven on every mesh."""


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """Description of a module, without its parameters.

    >>> tied = ModuleSpec("tied", width=2)
    >>> [name for name, _ in tied.build().named_parameters()]
    ['words.weight', 'norm.weight', 'norm.bias']
    >>> tied.build().head.weight is tied.build().words.weight, tied.ties
    (False, (('words', 'head'),))
    >>> torch.equal(tied.build().words.weight, tied.build().words.weight)  # the same each time
    True
    """

    kind: Kind = "mlp"
    width: int = 4
    """Features of its hidden layers."""
    seed: int = 0
    """Seed of the parameters."""
    dtype: torch.dtype = torch.float64

    def build(self, device: str | None = None) -> nn.Module:
        """The module; on "meta" without any values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = _KINDS[self.kind](self.width).to(self.dtype)
        return module if device is None else module.to(device)

    def batch(self, step: int) -> torch.Tensor:
        """The input of a step, the same on every rank."""
        random = torch.Generator().manual_seed(step)
        if self.kind == "tied":
            return torch.randint(WORDS, (3, 2), generator=random)
        return torch.rand((3, 2, self.width), generator=random, dtype=torch.float64).to(self.dtype)

    def layers(self) -> dict[str, nn.Module]:
        """Layers, by name, that tensor parallelism can divide: linear layers and embeddings."""
        named_modules = self.build("meta").named_modules()
        return {
            name: one for name, one in named_modules if isinstance(one, nn.Linear | nn.Embedding)
        }

    @property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """Pairs of layers that share one weight."""
        return (("words", "head"),) if self.kind == "tied" else ()


def modules(
    *,
    kinds: tuple[Kind, ...] = get_args(Kind),
    min_width: int = 1,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[ModuleSpec]:
    """Descriptions of modules; shrink to a narrow MLP.

    To train them, let `min_width` be no less than the ranks: torch 2.13 cannot update a DTensor in
    place whose sharded side is 1 and whose gradient it has replicated.
    """
    return st.builds(
        ModuleSpec,
        kind=st.sampled_from(kinds),
        width=st.integers(min_width, min_width + 6),
        seed=st.integers(0, 99),
        dtype=st.just(dtype),
    )


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width + 1)
        self.down = nn.Linear(width + 1, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(self.up(x).tanh())
        return down


class Frozen(Mlp):
    """An MLP with only one trainable layer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.up.requires_grad_(False)


class Buffers(Mlp):
    """An MLP with a persistent buffer and a non-persistent one."""

    seen: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return super().forward(x) * self.scale


class TiedModule(nn.Module):
    """An embedding, and a head that shares its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.norm(self.words(x)))
        return scores


class Transformer(nn.Module):
    """A block of attention and an MLP, each with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        query, key, value = self.query(y), self.key(y), self.value(y)
        x = x + self.out((query @ key.mT).softmax(dim=-1) @ value)
        mixed: torch.Tensor = x + self.mlp(self.norm2(x))
        return mixed


class Convolution(nn.Module):
    """A convolution over the sequence, and a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width + 1, kernel_size=2, padding=1)
        self.norm = nn.BatchNorm1d(width + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(self.conv(x.mT))
        return normed


_KINDS: dict[Kind, type[nn.Module]] = {
    "mlp": Mlp,
    "frozen": Frozen,
    "buffers": Buffers,
    "tied": TiedModule,
    "transformer": Transformer,
    "convolution": Convolution,
}
