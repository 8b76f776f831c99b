"""Parallel plans to draw: how a module is divided over a mesh, by TP, FSDP2, HSDP or several.

The names of the mesh's dimensions select the method: "replicate" and "shard" are FSDP2's, "tp" is
tensor parallelism's. Every layer takes and returns whole activations, so that any subset may be
divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from pytest_dcp.properties.meshes import ALONE, MeshSpec
from pytest_dcp.properties.modules import ModuleSpec

Style = Literal["colwise", "rowwise"]


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How a module is divided over a mesh; over one rank without names it is left plain."""

    mesh: MeshSpec = ALONE
    """Its dimensions are named replicate, shard and tp, in this order; any may be missing."""
    styles: tuple[tuple[str, Style], ...] = ()
    """Layer names -> how "tp" divides the layer."""
    units: tuple[str, ...] = ()
    """Children that FSDP2 shards and gathers separately."""
    reshard_after_forward: bool = True

    def apply(self, spec: ModuleSpec, device: str | None = None) -> nn.Module:
        """The divided module. Collective over the mesh, which must have been built."""
        module = spec.build(device)
        if not self.mesh.dim_names:
            return module
        mesh = self.mesh.build()
        if "tp" in self.mesh.dim_names and self.styles:
            styles = {name: _style(style) for name, style in self.styles}
            parallelize_module(module, mesh["tp"], styles)
            for one, other in spec.ties:
                _tie(module, one, other)
        data = tuple(name for name in self.mesh.dim_names if name != "tp")
        if data:
            for name in (*self.units, ""):
                fully_shard(
                    module.get_submodule(name),
                    mesh=mesh[data],
                    reshard_after_forward=self.reshard_after_forward,
                )
        return module


PLAIN = ParallelPlan()
"""No division, on one rank."""


@st.composite
def parallel_plans(draw: st.DrawFn, module: ModuleSpec, *, world_size: int = 4) -> ParallelPlan:
    """Tensor parallel plans of at most `world_size` ranks; shrink to a plain module on one rank."""
    size = draw(st.integers(1, world_size))
    styles = draw(_styles(module))
    return ParallelPlan(MeshSpec((size,), ("tp",)), styles) if styles else PLAIN


@st.composite
def fsdp_plans(
    draw: st.DrawFn, module: ModuleSpec, *, world_size: int = 4, tp: bool = True
) -> ParallelPlan:
    """FSDP2, HSDP, and with `tp` FSDP2 over tensor parallelism, on at most `world_size` ranks.

    Shrink to FSDP2 of the whole module on one rank.
    """
    choices = [{"shard": 1}] if world_size < 2 else []
    choices += [{"shard": size} for size in range(1, world_size + 1)]
    pairs = [(a, b) for a in range(2, world_size + 1) for b in range(2, world_size // a + 1)]
    choices += [{"replicate": a, "shard": b} for a, b in pairs]
    styles: tuple[tuple[str, Style], ...] = ()
    if tp:
        choices += [{"shard": a, "tp": b} for a, b in pairs]
        if world_size >= 8:
            choices.append({"replicate": 2, "shard": 2, "tp": 2})
    chosen = draw(st.sampled_from(choices))
    if "tp" in chosen:
        styles = draw(_styles(module))
    children = [name for name, one in module.build("meta").named_children() if _owns(one)]
    splits = bool(children) and not module.ties and draw(st.booleans())
    return ParallelPlan(
        MeshSpec(tuple(chosen.values()), tuple(chosen)),
        styles,
        tuple(children) if splits else (),
        draw(st.sampled_from([True, False])),
    )


def any_plans(module: ModuleSpec, *, world_size: int = 4) -> st.SearchStrategy[ParallelPlan]:
    """Any plan of at most `world_size` ranks; shrinks to a plain module on one rank."""
    return (
        st.just(PLAIN)
        | parallel_plans(module, world_size=world_size)
        | fsdp_plans(module, world_size=world_size)
    )


@st.composite
def _styles(draw: st.DrawFn, module: ModuleSpec) -> tuple[tuple[str, Style], ...]:
    """Styles for some layers; tied layers are divided along the same dimension of their weight."""
    tied = {name: pair for pair in module.ties for name in pair}
    chosen: dict[str, Style] = {}
    one: st.SearchStrategy[Style | None] = st.sampled_from([None, "colwise", "rowwise"])
    for name in module.layers():
        if name in chosen:
            continue
        style = draw(one)
        if style is None:
            continue
        chosen[name] = style
        if name in tied:
            first, second = tied[name]
            chosen |= {first: style, second: _OTHER[style]}
    return tuple(chosen.items())


_OTHER: dict[Style, Style] = {"colwise": "rowwise", "rowwise": "colwise"}
"""An embedding's weight is words by features, and a head's too: but the styles name the dimensions
the other way round, so one's rows are the other's columns.
"""


def _style(style: Style) -> ParallelStyle:
    if style == "colwise":
        return ColwiseParallel(output_layouts=Replicate())
    return RowwiseParallel(input_layouts=Replicate())


def _tie(module: nn.Module, one: str, other: str) -> None:
    module.get_submodule(other).weight = module.get_submodule(one).weight


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
