"""The conditions of `bisect` on a stored tensor: it has NaN, it is frozen, its norm is large."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.tensor_slabs import iterate_slabs

NORM = re.compile(r"norm\s*>\s*(\S+)")


@dataclass(frozen=True, slots=True)
class TensorCondition:
    """A test of one tensor."""

    kind: Literal["nan", "frozen", "norm"]
    limit: float = 0.0
    """Of the norm."""

    @classmethod
    def parse(cls, text: str) -> TensorCondition:
        """The condition that the text names. Raises ValueError for another text.

        >>> TensorCondition.parse("norm>1e3")
        TensorCondition(kind='norm', limit=1000.0)
        """
        if text == "nan":
            return cls("nan")
        if text == "frozen":
            return cls("frozen")
        if match := NORM.fullmatch(text):
            try:
                limit = float(match[1])
            except ValueError:
                limit = math.nan
            if not math.isnan(limit):
                return cls("norm", limit)
        raise ValueError(f"a test is nan, frozen, or norm>NUMBER (quoted); got {text!r}")

    def find_evidence(self, tensor: LazyTensor) -> str | None:
        """For nan and norm: in words why the condition holds; None if it does not.

        Reads the tensor, 32 MiB at a time.
        """
        if self.kind == "nan":
            return "NaN" if has_nan(tensor) else None
        norm = measure_norm(tensor)
        # A norm that is NaN is not below any limit.
        return None if norm <= self.limit else f"norm {norm:g}"


def has_nan(tensor: LazyTensor) -> bool:
    """Whether an element is NaN; reads up to the first one."""
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        return False
    return any(
        bool(_widen(tensor[index]).isnan().any())
        for index in iterate_slabs(tensor.shape, tensor.dtype.itemsize)
    )


def measure_norm(tensor: LazyTensor) -> float:
    """The 2-norm of all elements, in float64."""
    squares = 0.0
    for index in iterate_slabs(tensor.shape, tensor.dtype.itemsize):
        part = tensor[index]
        wide = part.abs() if part.dtype.is_complex else part
        squares += float(wide.to(torch.float64).square().sum())
    return math.sqrt(squares)


def _widen(part: torch.Tensor) -> torch.Tensor:
    """float8 has no operations."""
    return part.to(torch.float32) if part.dtype.itemsize == 1 else part
