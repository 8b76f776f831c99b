"""Wrappers of other tensors in opened checkpoints: everything read once, and two of them compared.

A name may be stored as wrappers in some shards and as plain elements in others, as torchao leaves
parts that are small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pytest_dcp._engine.lazy_reading.lazy_values import Lazy, LazyTensor
from pytest_dcp._engine.lazy_reading.stored_wrappers import StoredPart, StoredWrapper

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape, in elements of the full tensor."""


def iterate_elements(lazy: Lazy) -> Iterator[tuple[str, torch.Tensor]]:
    """Each inner tensor of the wrappers, and each shard that is none, with a name.

    The CRCs of the wrappers' records are checked, and the checksums of the other shards.
    """
    wrappers = lazy.wrappers
    for wrapper in wrappers:
        for part in wrapper.walk_parts():
            yield part.name, part.tensor()
    for offset, shape in _plain_boxes(lazy, wrappers):
        yield f"{lazy.name} at {list(offset)}", _read_box(lazy, offset, shape)


def find_difference(one: Lazy, other: Lazy) -> str | None:
    """The first difference of two names of which one, at least, is stored as wrappers; None if all
    inner tensors and attributes are the same."""
    wrappers, others = one.wrappers, other.wrappers
    by_box = {_box_of(wrapper): wrapper for wrapper in others}
    if {_box_of(wrapper) for wrapper in wrappers} != set(by_box):
        return (
            f"{len(wrappers)} and {len(others)} of the shards are wrappers of other tensors, and "
            "not the same ones: their elements cannot be compared"
        )
    for wrapper in wrappers:
        if (reason := _compare_wrappers(wrapper, by_box[_box_of(wrapper)])) is not None:
            return reason
    for offset, shape in _plain_boxes(one, wrappers):
        if not _have_equal_bits(_read_box(one, offset, shape), _read_box(other, offset, shape)):
            return f"the elements of the shard at {list(offset)} differ"
    return None


def _compare_wrappers(one: StoredWrapper, other: StoredWrapper) -> str | None:
    if one.kind != other.kind:
        return f"class {one.kind}, {other.kind}"
    if repr(one.attributes) != repr(other.attributes):
        return f"attributes {dict(one.attributes)!r:.80}, {dict(other.attributes)!r:.80}"
    if one.parts.keys() != other.parts.keys():
        return f"parts {', '.join(one.parts)}; {', '.join(other.parts)}"
    for attribute, part in one.parts.items():
        if (reason := _compare_parts(part, other.parts[attribute])) is not None:
            return reason
    return None


def _compare_parts(
    part: StoredPart | StoredWrapper, counterpart: StoredPart | StoredWrapper
) -> str | None:
    if isinstance(part, StoredWrapper) and isinstance(counterpart, StoredWrapper):
        reason = _compare_wrappers(part, counterpart)
        return None if reason is None else f"{part.name}: {reason}"
    if isinstance(part, StoredWrapper) or isinstance(counterpart, StoredWrapper):
        return f"{part.name}: a wrapper on one side, a plain tensor on the other"
    if (part.shape, part.dtype) != (counterpart.shape, counterpart.dtype):
        return (
            f"{part.name}: {part.dtype} of {tuple(part.shape)}, {counterpart.dtype} of "
            f"{tuple(counterpart.shape)}"
        )
    if not _have_equal_bits(part.tensor(), counterpart.tensor()):
        return f"the elements of {part.name} differ"
    return None


def _have_equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_quantized or b.is_quantized:
        return torch.equal(a, b)
    # Of no dimension, a tensor has no other view of bytes.
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def _box_of(wrapper: StoredWrapper) -> Box:
    return wrapper.offset, wrapper.shape


def _plain_boxes(lazy: Lazy, wrappers: tuple[StoredWrapper, ...]) -> list[Box]:
    """The shards of a tensor that are no wrappers."""
    if not isinstance(lazy, LazyTensor):
        return []
    wrapped = {wrapper.offset for wrapper in wrappers}
    return [(one.offset, one.shape) for one in lazy.shards if one.offset not in wrapped]


def _read_box(lazy: Lazy, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(lazy, LazyTensor):
        raise TypeError(f"{lazy.name!r} is a value, and has no boxes")
    sides = zip(offset, shape, strict=True)
    return lazy[tuple(slice(start, start + length) for start, length in sides)]
