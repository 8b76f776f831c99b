"""A state dict -> a copy of it on the CPU, so that training can go on while it is saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pytest_dcp.checkpoint.plan.shards import local_tensor


class Staging:
    """A writer's own stager, as torch's `AsyncStager` has it: blocks until the copy is made."""

    def __init__(self, cache_staged_state_dict: bool = False) -> None:
        """cache_staged_state_dict: copy into the memory of the last time where it fits."""
        self.cache_staged_state_dict = cache_staged_state_dict
        self._staged: dict[str, Any] | None = None

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether somebody must wait: no, `stage` did."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state dict on the CPU."""
        staged: dict[str, Any] = copied(state_dict, self._staged)
        if self.cache_staged_state_dict:
            self._staged = staged
        return staged

    def synchronize_staging(self) -> None:
        """Nothing: the copy is made when `stage` returns."""

    def close(self) -> None:
        """Let go of the kept memory."""
        self._staged = None


def copied(value: Any, into: Any = None) -> Any:
    """The value with every tensor copied to CPU memory of its own: what it views, not its storage.

    into: an earlier copy of the same value, whose tensors are used again where they fit.
    """
    if isinstance(value, DTensor):
        room = local_tensor(into) if isinstance(into, DTensor) else None
        local = copied(local_tensor(value), room)
        return DTensor.from_local(
            local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride()
        )
    if isinstance(value, torch.Tensor):
        if _fits(into, value):
            return into.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        rooms = into if isinstance(into, Mapping) else {}
        return {key: copied(inner, rooms.get(key)) for key, inner in value.items()}
    if isinstance(value, list):
        fits = isinstance(into, list) and len(into) == len(value)
        return [copied(inner, into[n] if fits else None) for n, inner in enumerate(value)]
    if isinstance(value, tuple):
        parts = [copied(inner) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return copy.deepcopy(value)


def _fits(into: Any, value: torch.Tensor) -> bool:
    return (
        isinstance(into, torch.Tensor)
        and into.dtype == value.dtype
        and into.shape == value.shape
        and into.device.type == "cpu"
    )
