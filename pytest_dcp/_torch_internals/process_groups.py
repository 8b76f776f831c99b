"""Properties of process groups without public access: devices, timeouts, the store, the list of
groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Public as `torch.distributed.ProcessGroup` and `Store`, but no type checker sees those. Can
    # go when torch lists them in `__all__`.
    from torch._C._distributed_c10d import ProcessGroup, Store

# torch's registry of groups; read where it is, since torch's threaded groups replace it.
TORCH.require_attributes(dist.distributed_c10d, "_world")
TORCH.require_attributes(
    ProcessGroup, "_device_types", "_get_backend", "_get_sequence_number_for_group"
)

__all__ = [
    "GroupRegistry",
    "ProcessGroup",
    "Store",
    "backend_timeout_s",
    "devices_of",
    "group_registry",
    "sequence_number",
]


class GroupRegistry(Protocol):
    """torch's list of this process's groups."""

    group_count: int
    """How many were made so far."""
    pg_map: Mapping[ProcessGroup, tuple[str, Store]]
    pg_names: Mapping[ProcessGroup, str]
    pg_group_ranks: Mapping[ProcessGroup, Mapping[int, int]]
    """By group: global rank -> rank in the group."""


def group_registry() -> GroupRegistry:
    """The registry as it is now. Can go when torch lists its groups and gives a group's store."""
    registry: Any = dist.distributed_c10d._world
    found: GroupRegistry = registry
    return found


def devices_of(group: ProcessGroup) -> Collection[torch.device]:
    """The devices whose tensors the group serves. Can go when torch makes them public."""
    found: Collection[torch.device] = group._device_types
    return found


def backend_timeout_s(group: ProcessGroup, device: torch.device) -> float | None:
    """The timeout of the group's backend for a device, in seconds; None where it has none.

    Can go when a group has a public timeout.
    """
    backend = group._get_backend(device)
    # Only backends with options have one: a fake backend has no options.
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return None if timeout is None else float(timeout.total_seconds())


def sequence_number(group: ProcessGroup) -> int:
    """How many collectives the group has begun; 0 for a backend that does not count.

    Can go when torch makes it public.
    """
    try:
        # torch's stub lacks it.
        count: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    except RuntimeError:
        return 0
    return count
