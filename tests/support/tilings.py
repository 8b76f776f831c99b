"""Strategies for boxes: tensors cut into boxes that tile them, and the boxes as torch's items."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape in the full tensor."""


def fewer(by: int) -> settings:
    """The profile's settings with fewer examples, for slow tests."""
    profile = settings.default or settings()
    return settings(profile, max_examples=max(1, profile.max_examples // by))


def elements(box: Box) -> set[tuple[int, ...]]:
    """The coordinates of every element of the box."""
    return set(product(*(range(o, o + n) for o, n in zip(*box, strict=True))))


def shapes(max_dims: int = 3, max_side: int = 6, min_side: int = 0) -> st.SearchStrategy[tuple]:
    return st.lists(st.integers(min_side, max_side), max_size=max_dims).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    """Any box of a tensor, empty ones among them."""
    offset = tuple(draw(st.integers(0, n)) for n in shape)
    return offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], cuts: int = 4) -> list[Box]:
    """Boxes that tile a tensor: the whole, cut again and again."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, cuts))):
        at = draw(st.integers(0, len(boxes) - 1))
        offset, sides = boxes[at]
        long = [dim for dim, n in enumerate(sides) if n > 1]
        if not long:
            continue
        dim = draw(st.sampled_from(long))
        cut = draw(st.integers(1, sides[dim] - 1))
        moved = (*offset[:dim], offset[dim] + cut, *offset[dim + 1 :])
        low = (*sides[:dim], cut, *sides[dim + 1 :])
        high = (*sides[:dim], sides[dim] - cut, *sides[dim + 1 :])
        boxes[at : at + 1] = [(offset, low), (moved, high)]
    return boxes


def shard_item(
    fqn: str,
    size: Sequence[int],
    box: Box,
    dtype: torch.dtype = torch.float32,
    kind: WriteItemType = WriteItemType.SHARD,
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1]))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(size))
    return WriteItem(MetadataIndex(fqn, box[0]), kind, tensor_data=data)


def value_item(fqn: str) -> WriteItem:
    return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)
