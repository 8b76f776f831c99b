"""Two opened checkpoints compared: names, shapes, dtypes, and elements.

Where both have checksums for the same boxes and these agree, no data byte is read.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from pytest_dcp._engine.lazy_reading.lazy_values import Lazy, LazyTensor, LazyValue
from pytest_dcp._engine.lazy_reading.megatron_common import COMMON
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint
from pytest_dcp._engine.lazy_reading.tensor_slabs import iterate_slabs
from pytest_dcp._engine.lazy_reading.wrapped_elements import find_difference
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject
from pytest_dcp.errors import CheckpointMismatchError, UntrustedPickleError


@dataclass(frozen=True, slots=True)
class NameDifference:
    """A name whose contents differ."""

    name: str
    reason: str
    """In words: another shape, another dtype, other elements, another value."""
    largest: float | None = None
    """The largest absolute deviation of two elements; None where it makes no sense."""
    elements: int | None = None
    """How many elements differ."""


@dataclass(frozen=True, slots=True)
class CheckpointDifferences:
    """The result of comparing two checkpoints."""

    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    differing: tuple[NameDifference, ...]
    equal_by_checksums: int
    """Names that were not read."""
    equal_by_reading: int
    unread: tuple[str, ...] = ()
    """Names whose checksums leave it open, if nothing was to be read."""

    def __bool__(self) -> bool:
        return bool(self.only_in_first or self.only_in_second or self.differing)


def compare_checkpoints(
    first: OpenCheckpoint,
    second: OpenCheckpoint,
    *,
    read: bool = True,
    report: Callable[[str], None] = lambda name: None,
) -> CheckpointDifferences:
    """The differences of two checkpoints, by flat name. NaN equals NaN of the same bits.

    read: read tensors and values that the checksums do not show to be equal. report: called with
    each name that is read.
    """
    equal = set(first.find_equal_names(second))
    differing: list[NameDifference] = []
    unread: list[str] = []
    by_reading = 0
    for name in first:
        if name in equal or name not in second:
            continue
        found = _compare_facts(name, first[name], second[name], read=read)
        if found is None and not read:
            unread.append(name)
            continue
        if found is None:
            report(name)
            found = _compare_contents(name, first[name], second[name])
            by_reading += found is None
        if found is not None:
            differing.append(found)
    if read:
        differing += _compare_common(first.common, second.common)
    return CheckpointDifferences(
        only_in_first=tuple(name for name in first if name not in second),
        only_in_second=tuple(name for name in second if name not in first),
        differing=tuple(differing),
        equal_by_checksums=len(equal),
        equal_by_reading=by_reading,
        unread=tuple(unread),
    )


def have_equal_elements(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether shape, dtype and the bits of all elements are the same; reads up to the first
    difference, 32 MiB at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(
        torch.equal(_bits_of(one[index]), _bits_of(other[index]))
        for index in iterate_slabs(one.shape, one.dtype.itemsize)
    )


def _compare_facts(name: str, one: Lazy, other: Lazy, *, read: bool) -> NameDifference | None:
    if type(one) is not type(other):
        # A wrapper of other tensors is a tensor in torch's checkpoints, and a value in this
        # engine's.
        if read and one.wrappers and other.wrappers:
            return None
        return NameDifference(name, "a tensor on one side, a value on the other")
    if isinstance(one, LazyTensor) and isinstance(other, LazyTensor):
        if one.shape != other.shape:
            return NameDifference(name, f"shape {tuple(one.shape)}, {tuple(other.shape)}")
        if one.dtype != other.dtype:
            return NameDifference(name, f"dtype {one.dtype}, {other.dtype}")
    return None


def _compare_contents(name: str, one: Lazy, other: Lazy) -> NameDifference | None:
    try:
        if isinstance(one, LazyTensor) and isinstance(other, LazyTensor):
            return _compare_elements(name, one, other)
        if isinstance(one, LazyValue) and isinstance(other, LazyValue):
            return _compare_values(name, one, other)
    except (CheckpointMismatchError, UntrustedPickleError) as error:
        if not _is_either_wrapped(one, other):
            reason = error.reason if isinstance(error, UntrustedPickleError) else str(error)
            return NameDifference(name, f"cannot be compared: {reason}")
    difference = find_difference(one, other)
    return None if difference is None else NameDifference(name, difference)


def _is_either_wrapped(one: Lazy, other: Lazy) -> bool:
    with suppress(CheckpointMismatchError):  # a tensor of a quantised dtype
        return bool(one.wrappers or other.wrappers)
    return False


def _compare_elements(name: str, one: LazyTensor, other: LazyTensor) -> NameDifference | None:
    largest, elements = 0.0, 0
    for index in iterate_slabs(one.shape, one.dtype.itemsize):
        a, b = one[index], other[index]
        if torch.equal(_bits_of(a), _bits_of(b)):
            continue  # Without the memory for which elements differ.
        unequal = _find_unequal(a, b)
        elements += int(unequal.sum())
        largest = max(largest, _deviation(a[unequal], b[unequal]))
    if not elements:
        return None
    plural = "1 element differs" if elements == 1 else f"{elements:,} elements differ"
    return NameDifference(name, plural, largest, elements)


def _deviation(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest deviation; infinite where one side alone is NaN."""
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    one, other = a.to(wide), b.to(wide)
    gap = (one - other).abs()
    # Infinities of one sign have no difference that is a number, and neither have two NaN.
    gap[(one == other) | (one.isnan() & other.isnan())] = 0.0
    return float(torch.nan_to_num(gap, nan=float("inf")).max())


def _find_unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements differ in their bits: NaN is then equal to itself."""
    differs = _bits_of(a) != _bits_of(b)
    return differs.any(-1) if a.itemsize == 16 else differs


def _bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their size; as pairs of such where no integer is so wide."""
    if tensor.itemsize == 16:
        return torch.view_as_real(tensor).contiguous().view(torch.int64)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.contiguous().view(kind)


def _compare_values(name: str, one: LazyValue, other: LazyValue) -> NameDifference | None:
    a, b = one.value(), other.value()
    return None if _same(a, b) else NameDifference(name, f"value {a!r:.60}, {b!r:.60}")


def _compare_common(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[NameDifference]:
    """The values of `common.pt` that differ, or that one side lacks."""
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key, _ABSENT), other.get(key, _ABSENT)
        if not _same(a, b):
            yield NameDifference(f"{COMMON}: {key}", f"value {a!r:.60}, {b!r:.60}")


class _Absent:
    def __repr__(self) -> str:
        return "(none)"


_ABSENT = _Absent()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Namespace) and isinstance(b, Namespace):
        return _same(vars(a), vars(b))
    if isinstance(a, UnreadObject) and isinstance(b, UnreadObject):
        return a.class_name == b.class_name
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    try:
        return type(a) is type(b) and bool(a == b)
    except (RuntimeError, ValueError):  # of arrays with many elements
        return repr(a) == repr(b)
