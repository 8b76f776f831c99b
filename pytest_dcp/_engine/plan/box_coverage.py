"""Whether the boxes of an index tile their tensors. Pure (no I/O).

Boxes tile a tensor when they lie inside it, no two overlap, and their elements add up to the
tensor's. The sum proves this only if the first two conditions hold, so a key that fails one check
is left out of the next one.

Finding overlaps is the expensive part. Most tensors are cut along one dimension, for which a single
pass over neighbouring rows is enough (`_find_suspects`). Only the remaining tensors are swept
(`boxes.overlapping_pairs`), once for each distinct layout.

Two ranks hold `w` by rows; the second begins a row too late, and both hold the whole of `b`:

>>> import torch
>>> from torch.distributed.checkpoint.metadata import (
...     ChunkStorageMetadata, TensorProperties, TensorStorageMetadata)
>>> def stored(size, *boxes):
...     chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
...     return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
>>> index = Index.of({
...     "w": stored([4, 2], ([0, 0], [2, 2]), ([3, 0], [1, 2])),
...     "b": stored([2], ([0], [2]), ([0], [2])),
... })
>>> for line in problems_of(index, complete=True):
...     print(line)
key:w invalid fill tensor-volume: 8 chunks-volume: 6
key:b has overlapping chunks: ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([2]))
ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([2]))

If each rank plans alone, a gap is not an error, since other ranks may fill it:

>>> [line.split()[0] for line in problems_of(index, complete=False)]
['key:b']
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.plan.boxes import Ints, out_of_bounds, overlapping_pairs, volumes
from pytest_dcp._engine.plan.index import Index


def problems_of(index: Index, *, complete: bool) -> list[str]:
    """The problems of the boxes, one line each, in the order of the keys.

    These are boxes out of bounds, overlapping boxes, and, if `complete`, elements that no box
    holds.
    """
    key = index.key_of
    problems: list[tuple[int, str]] = []
    outside = out_of_bounds(index.offset, index.shape, index.size[key]) & (index.ndim[key] >= 0)
    for row in np.flatnonzero(outside):
        chunk = index.chunk(int(row))
        at = int(key[row])
        problems.append((at, f"key:{index.fqns[at]} has out of bounds chunk: "
                             f"tensor-size:{_size(index, at)} chunk: {chunk}"))  # fmt: skip
    # Each further check assumes that the boxes have passed the ones before.
    bad = set(key[outside].tolist())
    for at, one, other in overlaps(index, bad):
        problems.append((at, f"key:{index.fqns[at]} has overlapping chunks: "
                             f"{index.chunk(one)} {index.chunk(other)}"))  # fmt: skip
        bad.add(at)
    if complete:
        for at, chunk_volume, whole in _gaps(index, bad):
            problems.append((at, f"key:{index.fqns[at]} invalid fill tensor-volume: "
                                 f"{whole} chunks-volume: {chunk_volume}"))  # fmt: skip
    return [text for _, text in sorted(problems, key=lambda problem: problem[0])]


def _gaps(index: Index, bad: set[int]) -> list[tuple[int, int, int]]:
    """Keys whose boxes do not add up to the tensor: key, elements held, elements of the tensor."""
    chunk_volume = np.zeros(len(index), dtype=np.int64)
    np.add.at(chunk_volume, index.key_of, volumes(index.shape))
    whole = volumes(index.size)
    wrong = np.flatnonzero((chunk_volume != whole) & (index.ndim >= 0))
    return [(int(at), int(chunk_volume[at]), int(whole[at])) for at in wrong if int(at) not in bad]


def overlaps(
    index: Index, skip: Collection[int] = (), only: NDArray[np.bool_] | None = None
) -> list[tuple[int, int, int]]:
    """Keys with overlapping boxes, and one pair of overlapping rows for each."""
    found: list[tuple[int, int, int]] = []
    seen: dict[bytes, list[tuple[int, int]]] = {}
    suspects = _find_suspects(index) if only is None else _find_suspects(index) & only
    for at in np.flatnonzero(suspects).tolist():
        if at in skip:
            continue
        rows = slice(int(index.first[at]), int(index.first[at + 1]))
        offset, shape = index.offset[rows], index.shape[rows]
        # Layers of a model repeat the same boxes.
        layout = offset.tobytes() + shape.tobytes()
        if layout not in seen:
            seen[layout] = overlapping_pairs(offset, shape, limit=1)
        found += [(at, rows.start + one, rows.start + other) for one, other in seen[layout]]
    return found


def _find_suspects(index: Index) -> NDArray[np.bool_]:
    """Keys that may have overlapping boxes.

    If all boxes of a key are cut along one dimension only and are sorted by offset, it is enough
    that each ends before or where the next begins.
    """
    chunks = len(index.offset)
    several = np.diff(index.first) > 1
    if not chunks or not several.any():
        return several
    # For each key, the dimensions along which any of its boxes is shorter than the tensor.
    partial = index.shape != index.size[index.key_of]
    # Trailing keys without boxes start behind the last row, where reduceat does not go; `several`
    # discards their result.
    cut = np.logical_or.reduceat(partial, np.minimum(index.first[:-1], chunks - 1), axis=0)
    one_dim = cut.sum(axis=1) <= 1
    dim = np.argmax(cut, axis=1)[index.key_of]
    row = np.arange(chunks)
    start: Ints = index.offset[row, dim]
    stop = start + index.shape[row, dim]
    # Boxes that are not sorted look like a clash here, and are swept: slow, but right.
    meets = np.zeros(chunks, dtype=bool)
    meets[1:] = (stop[:-1] > start[1:]) & (index.key_of[1:] == index.key_of[:-1])
    clash = np.zeros(len(index), dtype=bool)
    clash[index.key_of[meets]] = True
    suspects: NDArray[np.bool_] = several & (~one_dim | clash)
    return suspects


def _size(index: Index, at: int) -> tuple[int, ...]:
    return tuple(index.size[at, : max(int(index.ndim[at]), 0)].tolist())
