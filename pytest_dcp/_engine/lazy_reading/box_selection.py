"""The index of `tensor[index]` -> the box to read, and the rest of the index. Pure (no I/O).

Integers and slices choose a box; a step, and a dimension that an integer removes, are applied to
the box in memory.

>>> box = select_box((4, 6), (slice(1, 3), slice(0, 6, 2)), "w")
>>> box.offset, box.shape, box.inside
((1, 0), (2, 5), (slice(None, None, 1), slice(None, None, 2)))
>>> select_box((4, 6), -1, "w")
SelectedBox(offset=(3, 0), shape=(1, 6), inside=(0, slice(None, None, 1)))
>>> select_box((4, 6), (..., slice(2, 3)), "w").shape
(4, 1)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SelectedBox:
    """A part of a tensor that an index selects."""

    offset: tuple[int, ...]
    """In elements of the full tensor."""
    shape: tuple[int, ...]
    """Of the box to read; it has all dimensions of the tensor."""
    inside: tuple[int | slice, ...]
    """The index of the result in that box."""


def select_box(shape: tuple[int, ...], index: Any, fqn: str) -> SelectedBox:
    """The box that the index selects of a tensor of this shape.

    Raises IndexError if it is out of range or has too many dimensions, TypeError for anything but
    integers, slices and an ellipsis, ValueError for a step of 0 or less.
    """
    keys = _expand(index if isinstance(index, tuple) else (index,), len(shape), fqn)
    offset: list[int] = []
    lengths: list[int] = []
    inside: list[int | slice] = []
    for dim, (key, side) in enumerate(zip(keys, shape, strict=True)):
        if isinstance(key, slice):
            start, length, step = _resolve_slice(key, side, fqn)
            inside.append(slice(None, None, step))
        else:
            start, length = _resolve_position(key, side, dim, fqn), 1
            inside.append(0)
        offset.append(start)
        lengths.append(length)
    return SelectedBox(tuple(offset), tuple(lengths), tuple(inside))


def _expand(keys: tuple[Any, ...], ndim: int, fqn: str) -> tuple[Any, ...]:
    """One key for each dimension."""
    ellipses = [n for n, key in enumerate(keys) if key is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError(f"{fqn!r}: an index can have one ellipsis, got {len(ellipses)}")
    if len(keys) - len(ellipses) > ndim:
        raise IndexError(
            f"{fqn!r} has {ndim} dimension{'' if ndim == 1 else 's'}, the index has "
            f"{len(keys) - len(ellipses)}"
        )
    at = ellipses[0] if ellipses else len(keys)
    rest = (slice(None),) * (ndim - len(keys) + len(ellipses))
    return keys[:at] + rest + keys[at + len(ellipses) :]


def _resolve_slice(key: slice, side: int, fqn: str) -> tuple[int, int, int]:
    """Start, length in elements, and step."""
    step = 1 if key.step is None else operator.index(key.step)
    if step < 1:
        raise ValueError(f"{fqn!r}: a slice's step must be 1 or more, got {step}")
    start, stop, _ = key.indices(side)
    count = max(0, -(-(stop - start) // step))
    return start, (count - 1) * step + 1 if count else 0, step


def _resolve_position(key: Any, side: int, dim: int, fqn: str) -> int:
    ndim: object = getattr(key, "ndim", 0)  # of an array or tensor, which may have __index__
    if isinstance(key, bool) or not hasattr(key, "__index__") or ndim:
        raise TypeError(
            f"{fqn!r}: an index takes integers, slices and an ellipsis, got "
            f"{type(key).__name__}: read the tensor, and index that"
        )
    position = operator.index(key)
    if not -side <= position < side:
        raise IndexError(
            f"{fqn!r}: position {position} is out of range in dimension {dim}, which has {side}"
        )
    return position % side
