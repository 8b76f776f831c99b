"""States to save, and how they compare: tensors with known values, in any layout.

The oracle is always the unsharded tensor: `numbered` gives the same one on every rank.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")
"""torch's own engine. As Any: it exports its names without saying so to a type checker."""

DISABLED = "torch.distributed is disabled, unavailable or uninitialized"
EXISTING = "Detected an existing checkpoint"


def numbered(*shape: int, start: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that has another value at each place."""
    count = math.prod(shape)
    return torch.arange(start, start + count, dtype=torch.float64).reshape(shape).to(dtype)


def spread(full: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """The full tensor as a DTensor: each rank takes its part, nothing is sent."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def blank(value: Any) -> Any:
    """The same state with no value left: tensors are filled with another bit pattern."""
    if isinstance(value, DTensor):
        local = blank(value.to_local())
        return DTensor.from_local(
            local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
        )
    if isinstance(value, torch.Tensor):
        copy = value.detach().clone(memory_format=torch.preserve_format)
        bits(copy).fill_(1)
        return copy
    if isinstance(value, Mapping):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [blank(inner) for inner in value]
    return None


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as bytes, one more dimension."""
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    return tensor.detach().unsqueeze(-1).view(torch.uint8)


def same(one: Any, other: Any) -> bool:
    """Whether two states have the same structure and the same bits in the same layouts."""
    if isinstance(one, DTensor) and isinstance(other, DTensor):
        return (
            one.placements == other.placements
            and one.shape == other.shape
            and same(one.to_local(), other.to_local())
        )
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and not isinstance(other, DTensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(bits(one), bits(other))
        )
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and list(one) == list(other)
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other, strict=True))
        )
    return type(one) is type(other) and bool(one == other)


@contextmanager
def without_warnings(*texts: str) -> Iterator[None]:
    """Expected warnings that are no part of what the test is about."""
    with warnings.catch_warnings():
        for text in texts or (EXISTING, DISABLED):
            warnings.filterwarnings("ignore", message=text)
        yield


def pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """All ordered pairs."""
    return [(one, other) for one in values for other in values]
