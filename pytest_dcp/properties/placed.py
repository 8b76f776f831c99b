"""A state in a layout: the object that laws save, load and compare with.

Every law applies to a class that knows how many ranks hold the state and can build a rank's part,
and the whole state without a world.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from pytest_dcp.properties.bits import flip
from pytest_dcp.properties.meshes import MeshSpec


class Placed(Protocol):
    """A state dict in a layout, described."""

    @property
    def world_size(self) -> int:
        """The number of ranks that hold it: the first of the world."""

    @property
    def meshes(self) -> tuple[MeshSpec, ...]:
        """The meshes that `state` uses: a law builds them in all ranks of the world beforehand."""

    def full(self) -> dict[str, Any]:
        """The unsharded state: plain CPU tensors, identical in every process."""

    def state(self, device: str | None = None) -> dict[str, Any]:
        """This rank's state dict, new each time; on "meta" without any values."""


def empty_state(state: Any) -> Any:
    """The same containers around the same tensors, without their values.

    Every bit of every tensor is inverted in place, each memory once; other values become None.
    """
    seen: set[int] = set()

    def empty(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            local = local_of(value)
            if not local.is_meta and id(value) not in seen and local.data_ptr() not in seen:
                flip(local)
                seen.update((id(value), *([local.data_ptr()] if local.numel() else [])))
            return value
        if isinstance(value, Mapping):
            return {key: empty(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [empty(inner) for inner in value]
        return None

    return empty(state)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of the tensor."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def flat(state: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, keyed by their dotted paths."""
    if isinstance(state, Mapping | list):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in items:
            yield from flat(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, state


def tensors_of(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Only the tensors."""
    return ((fqn, value) for fqn, value in flat(state) if isinstance(value, torch.Tensor))
