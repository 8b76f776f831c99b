"""Tensors in parts that are written one after another, and batches of these that fit into memory.
Pure (no I/O).

>>> from dataclasses import make_dataclass
>>> Kind = make_dataclass("Kind", ["name", "dtype", "shape", "nbytes"])
>>> tensors = [Kind("a", torch.uint8, (3, 2), 6), Kind("b", torch.uint8, (2,), 2)]
>>> for batch in batch_slabs(tensors, limit=4):
...     [(slab.fqn, slab.offset, slab.shape) for slab in batch]
[('a', (0, 0), (2, 2))]
[('a', (2, 0), (1, 2)), ('b', (0,), (2,))]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pytest_dcp._engine.io.copy_plan import slabs
from pytest_dcp._engine.plan.boxes import strides_of

MOST_SLABS = 4096
"""In a batch: thousands of tiny tensors need more memory for their descriptions than they have."""


class NamedTensor(Protocol):
    """A tensor that is to be written."""

    @property
    def name(self) -> str:
        """In the slabs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the full tensor."""

    @property
    def nbytes(self) -> int:
        """Of the full tensor."""


@dataclass(frozen=True, slots=True)
class Slab:
    """A box of a full tensor that is one run of its bytes."""

    fqn: str
    dtype: torch.dtype
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def batch_slabs(tensors: Iterable[NamedTensor], limit: int) -> Iterator[list[Slab]]:
    """The tensors' slabs, in order, in batches of at most `limit` bytes; a batch has one element at
    least.

    Empty tensors have none.
    """
    batch: list[Slab] = []
    batch_bytes = 0
    for tensor in tensors:
        for slab in slabs_of(tensor, limit):
            if batch and (batch_bytes + slab.nbytes > limit or len(batch) == MOST_SLABS):
                yield batch
                batch, batch_bytes = [], 0
            batch.append(slab)
            batch_bytes += slab.nbytes
    if batch:
        yield batch


def slabs_of(tensor: NamedTensor, limit: int) -> list[Slab]:
    """The tensor in runs of at most `limit` bytes, in the order of its data; no runs if it is
    empty."""
    if not tensor.nbytes:
        return []
    if tensor.nbytes <= limit:
        return [Slab(tensor.name, tensor.dtype, (0,) * len(tensor.shape), tuple(tensor.shape))]
    shape = np.array([tensor.shape], dtype=np.int64).reshape(1, len(tensor.shape))
    stride = strides_of(shape)[0] * tensor.dtype.itemsize
    return [
        Slab(tensor.name, tensor.dtype, tuple(offset.tolist()), tuple(part.tolist()))
        for offset, part in slabs(shape[0], stride, tensor.dtype.itemsize, limit)
    ]
