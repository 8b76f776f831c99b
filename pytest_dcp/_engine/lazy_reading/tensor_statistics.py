"""Figures of a stored tensor, which is read part by part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.tensor_slabs import iterate_slabs

BINS = 20


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Of the finite elements, but for the counts; of complex elements the absolute value counts."""

    elements: int
    nan: int
    infinite: int
    zero: int
    minimum: float | None
    """None where no element is finite."""
    maximum: float | None
    mean: float | None
    deviation: float | None
    """The standard deviation of the elements, divided by their number."""
    histogram: tuple[int, ...]
    """Elements in equal bins from the minimum to the maximum."""


def measure_tensor(tensor: LazyTensor, bins: int = BINS) -> TensorStatistics:
    """The figures; the tensor is read twice, 32 MiB at a time."""
    nan = infinite = zero = count = 0
    total = 0.0
    low, high = math.inf, -math.inf
    parts = list(iterate_slabs(tensor.shape, tensor.dtype.itemsize))
    for index in parts:
        part = _plain(tensor[index])
        finite = part[torch.isfinite(part)]
        nan += int(part.isnan().sum())
        infinite += int(part.isinf().sum())
        zero += int((part == 0).sum())
        count += finite.numel()
        if finite.numel():
            total += float(finite.sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    elements = tensor.shape.numel()
    if not count:
        return TensorStatistics(elements, nan, infinite, zero, None, None, None, None, ())
    mean, squares = total / count, 0.0
    histogram = torch.zeros(bins, dtype=torch.int64)
    for index in parts:
        part = _plain(tensor[index])
        finite = part[torch.isfinite(part)]
        squares += float(((finite - mean) ** 2).sum())
        histogram += torch.histc(finite, bins, low, high if high > low else low + 1).to(torch.int64)
    deviation = math.sqrt(squares / count)
    return TensorStatistics(
        elements, nan, infinite, zero, low, high, mean, deviation, tuple(histogram.tolist())
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as float64, flat."""
    real = tensor.to(torch.complex128).abs() if tensor.dtype.is_complex else tensor
    return real.to(torch.float64).reshape(-1)
