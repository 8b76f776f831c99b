"""A large tensor in parts that fit into memory. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pytest_dcp._engine.io.copy_plan import slabs
from pytest_dcp._engine.plan.boxes import strides_of

SLAB_BYTES = 32 << 20


def iterate_slabs(
    shape: Sequence[int], itemsize: int, limit: int = SLAB_BYTES
) -> Iterator[tuple[slice, ...]]:
    """Indices of parts of at most `limit` bytes, which together are the tensor; none if it is
    empty.

    >>> list(iterate_slabs((3, 2), itemsize=4, limit=16))
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(0, 2, None))]
    """
    if 0 in shape:
        return
    table = np.array([shape], dtype=np.int64).reshape(1, len(shape))
    stride = strides_of(table)[0] * itemsize
    for offset, part in slabs(table[0], stride, itemsize, limit):
        yield tuple(
            slice(start, start + length)
            for start, length in zip(offset.tolist(), part.tolist(), strict=True)
        )
