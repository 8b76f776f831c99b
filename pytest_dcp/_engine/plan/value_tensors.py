"""Checks that a tensor stored as a value fits the tensor to load it into. Pure (no I/O).

The existing tensor is never replaced: a model or an optimizer holds it, and would not see the new
one.
"""

from __future__ import annotations

import torch

from pytest_dcp._engine.plan.numbers import kind_of
from pytest_dcp._engine.plan.shards import PLAIN
from pytest_dcp.errors import CheckpointMismatchError


def check_tensor(fqn: str, here: torch.Tensor, value: torch.Tensor, *, strict: bool) -> None:
    """Check that the stored tensor can be copied into the existing one.

    Raises CheckpointMismatchError, naming the key and both kinds, if it has another class, layout
    or size, or is quantised, or, if `strict`, has a dtype of another kind.
    """
    plain = type(here) in PLAIN and type(value) in PLAIN and here.layout is value.layout
    fits = plain and here.shape == value.shape and not value.is_quantized
    if not fits or (strict and kind_of(here.dtype) != kind_of(value.dtype)):
        raise tensor_misfit(fqn, here, _describe(value))


def tensor_misfit(fqn: str, here: torch.Tensor, stored: str) -> CheckpointMismatchError:
    """The error for a tensor that cannot take the stored one."""
    return CheckpointMismatchError(
        f"{fqn!r} is {stored} in the checkpoint, and {_describe(here)} here: load it into a "
        "tensor of the stored kind",
        mismatched=(fqn,),
    )


def _describe(tensor: torch.Tensor) -> str:
    kind = type(tensor)
    name = "tensor" if kind in PLAIN else f"{kind.__module__}.{kind.__qualname__}"
    quantised = "quantised " if tensor.is_quantized else ""
    layout = "" if tensor.layout is torch.strided else f" and {tensor.layout}"
    return f"a {quantised}{name} of {tensor.dtype}{layout} and size {tuple(tensor.shape)}"
