"""Loads numbers into tensors of one element, and the reverse, if they fit. Pure (no I/O).

A learning rate is 0.5 in one run and a tensor in the next (a capturable optimizer). The number fits
if it stays the same except for rounding: float to any float, int to an int that is wide enough or
to a float that holds it exactly, either to complex, bool to bool.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import CheckpointMismatchError

NUMBERS = (bool, int, float, complex)
_WIDER = {("int", "float"), ("int", "complex"), ("float", "complex")}


def kind_of(dtype: torch.dtype) -> str:
    """float, complex, bool or int: a change within a kind keeps the values, except for
    precision."""
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "float"
    return "bool" if dtype == torch.bool else "int"


def takes_tensor_of(kind: type, dtype: torch.dtype, *, strict: bool) -> bool:
    """Whether a number of this class may be loaded from a tensor of one element of the dtype."""
    if kind not in NUMBERS:
        return False
    pair = (kind_of(dtype), kind.__name__)
    return not strict or pair[0] == pair[1] or pair in _WIDER


def number_of(fqn: str, tensor: torch.Tensor, kind: type, *, strict: bool) -> Any:
    """The tensor's one element as a number of the class.

    Raises CheckpointMismatchError, naming the fqn, if it does not fit.
    """
    found = tensor.item()
    number = kind(found.real if isinstance(found, complex) and kind is not complex else found)
    if strict and number != found and not _both_nan(number, found):
        raise _misfit(fqn, f"a tensor of {found!r}", f"a {kind.__name__} here")
    return number


def check_number(fqn: str, target: torch.Tensor, value: Any, *, strict: bool) -> Any:
    """The number that a tensor of one element can be filled with.

    Raises CheckpointMismatchError, naming the fqn, for anything but a number that fits.
    """
    here = f"a tensor of {target.dtype} and shape {tuple(target.shape)} here"
    number = value.item() if isinstance(value, np.generic) else value
    if type(number) not in NUMBERS:
        raise _misfit(fqn, f"a Python value ({type(value).__name__})", here)
    if isinstance(target, ShardedTensor) or target.numel() != 1:
        raise _misfit(fqn, f"the number {number!r}", here)
    if strict and not _fits(number, target.dtype):
        raise _misfit(fqn, f"the number {number!r}", f"{here}, which it does not fit")
    return number


def fill_tensor(target: torch.Tensor, number: Any) -> None:
    """Fill a tensor in place with a checked number."""
    memory = local_tensor(target) if isinstance(target, DTensor) else target.detach()
    with torch.no_grad():
        memory.copy_(torch.tensor(number).to(memory.dtype))


def _fits(number: Any, dtype: torch.dtype) -> bool:
    kind, wanted_kind = type(number).__name__, kind_of(dtype)
    if kind != wanted_kind and (kind, wanted_kind) not in _WIDER:
        return False
    if kind == "int" and wanted_kind == "int":
        limits = torch.iinfo(dtype)
        return bool(limits.min <= number <= limits.max)
    try:
        converted = torch.tensor(number).to(dtype).item()
    except (RuntimeError, OverflowError, ValueError):
        return False
    if kind == "int":
        return bool(converted == number)
    return _is_finite(converted) or not _is_finite(number)


def _is_finite(number: Any) -> bool:
    number = complex(number)
    return math.isfinite(number.real) and math.isfinite(number.imag)


def _both_nan(one: Any, other: Any) -> bool:
    return bool(one != one and other != other)


def _misfit(fqn: str, stored: str, here: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{fqn!r} is {stored} in the checkpoint, and {here}", mismatched=(fqn,)
    )
