"""Compares a wrapper's attributes other than its inner tensors with the target's. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from pytest_dcp.errors import CheckpointMismatchError

SAYS = (bool, int, float, str, type(None), torch.dtype, torch.Size, torch.device)
"""Types of attributes that are compared; tuples and lists of them are compared too."""


def require_same_attributes(
    fqn: str, target: torch.Tensor, stored: Mapping[str, Any], inner: Collection[str]
) -> None:
    """Compare the attributes stored with a wrapper with the target's."""
    for name, there in stored.items():
        here = getattr(target, name, there)
        if name not in inner and _says(there) and _says(here) and here != there:
            key = f"{fqn}.{name}"
            raise CheckpointMismatchError(
                f"{key!r} is {there!r} in the checkpoint, and {here!r} here", mismatched=(key,)
            )


def _says(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_says, value))
    return isinstance(value, SAYS)
