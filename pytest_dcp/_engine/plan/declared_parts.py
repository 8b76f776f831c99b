"""Plain tensors whose attributes declare which boxes of a larger tensor they hold.

The attributes are those of torch 2.14's `CheckpointableTensor`: `global_shape`, and for each box an
entry in `global_offsets`, `local_offsets` and `local_sizes`. The tensor may hold other elements
too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from pytest_dcp._engine.plan.placement_boxes import LocalBox
from pytest_dcp.errors import PlanError

BOXES = "global_offsets"
"""The attribute that is checked first; hardly any tensor has it."""
ATTRIBUTES = ("global_shape", BOXES, "local_offsets", "local_sizes")


def declares_parts(value: Any) -> bool:
    """Whether the value is a tensor with all of the attributes and without its own hooks."""
    return (
        hasattr(value, BOXES)
        and isinstance(value, torch.Tensor)
        and all(hasattr(value, name) for name in ATTRIBUTES)
        and not hasattr(value, "__create_write_items__")
    )


def declarations_of(value: Any) -> dict[str, Any]:
    """The attributes of a tensor that has them; {} for any other."""
    return {name: getattr(value, name) for name in ATTRIBUTES} if declares_parts(value) else {}


def declare_parts(tensor: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    """The tensor, with the attributes of another of its shape."""
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def global_shape(fqn: str, value: Any) -> torch.Size:
    """The shape of the tensor that the value is a part of.

    Raises PlanError, naming the fqn, if it is not a valid shape.
    """
    return torch.Size(_read_integers(fqn, "global_shape", value.global_shape))


def declared_boxes(fqn: str, value: Any) -> tuple[LocalBox, ...]:
    """The boxes that the value declares to hold.

    Raises PlanError, naming the fqn, for attributes that are not sequences of integers, and for
    boxes that are not inside their tensors.
    """
    shape, local = tuple(global_shape(fqn, value)), tuple(value.shape)
    lists = [_read_each_part(fqn, name, getattr(value, name)) for name in ATTRIBUTES[1:]]
    if len({len(of) for of in lists}) > 1:
        raise PlanError(
            f"{fqn!r} declares {len(lists[0])} part(s) of a tensor of size {shape}: its "
            f"global_offsets, local_offsets and local_sizes must have the same length, got "
            f"{[len(of) for of in lists]}"
        )
    boxes = []
    for n, (offset, inside, size) in enumerate(zip(*lists, strict=True)):
        for what, start, full in (("global", offset, shape), ("local", inside, local)):
            if not len(start) == len(size) == len(full) or any(
                a < 0 or b < 0 or a + b > c for a, b, c in zip(start, size, full, strict=True)
            ):
                raise PlanError(
                    f"{fqn!r}: part {n} of size {size} at {what}_offsets[{n}] = {start} is outside "
                    f"of the {what} shape {full}"
                )
        boxes.append(LocalBox(offset, size, inside))
    return tuple(boxes)


def _read_each_part(fqn: str, name: str, declared: Any) -> list[tuple[int, ...]]:
    if isinstance(declared, str) or not isinstance(declared, Iterable):
        raise PlanError(
            f"{fqn!r}: its {name} must be a sequence of integers a part, got {declared!r}"
        )
    return [_read_integers(fqn, f"{name}[{n}]", one) for n, one in enumerate(declared)]


def _read_integers(fqn: str, name: str, declared: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(side) for side in declared)
    except TypeError:
        raise PlanError(
            f"{fqn!r}: its {name} must be a sequence of integers, got {declared!r}"
        ) from None
