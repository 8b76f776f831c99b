"""Optimizers to draw: SGD, Adam and AdamW, with one or several groups of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from hypothesis import strategies as st
from torch import nn

Method = Literal["sgd", "momentum", "adam", "amsgrad", "adamw"]


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """Description of an optimizer, without its state.

    >>> from hypothesis import given
    >>> @given(optimizers(methods=("sgd", "adamw")))
    ... def check(spec):
    ...     assert spec.method in ("sgd", "adamw") and 1 <= len(spec.rates) <= 3
    >>> check()
    """

    method: Method = "sgd"
    rates: tuple[float, ...] = (0.1,)
    """Learning rates: one group for each; the trained parameters are assigned to them in turn."""

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the module's trained parameters."""
        trained = [one for one in module.parameters() if one.requires_grad]
        count = len(self.rates)
        groups: list[dict[str, Any]] = [
            {"params": trained[number::count], "lr": rate}
            for number, rate in enumerate(self.rates)
            if trained[number::count]
        ]
        # No foreach: it needs all tensors on one mesh, and a plan may leave some parameters plain.
        if self.method in ("sgd", "momentum"):
            momentum = 0.9 if self.method == "momentum" else 0.0
            return torch.optim.SGD(groups, momentum=momentum, foreach=False)
        if self.method == "adamw":
            return torch.optim.AdamW(groups, weight_decay=0.1, foreach=False)
        return torch.optim.Adam(groups, amsgrad=self.method == "amsgrad", foreach=False)


def optimizers(
    *, methods: tuple[Method, ...] = get_args(Method)
) -> st.SearchStrategy[OptimizerSpec]:
    """Descriptions of optimizers; shrink to SGD with one group."""
    rates = st.lists(st.sampled_from([0.1, 0.01]), min_size=1, max_size=3).map(tuple)
    return st.builds(OptimizerSpec, method=st.sampled_from(methods), rates=rates)
