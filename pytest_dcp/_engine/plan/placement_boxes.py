"""Which part of a full tensor a rank holds, from mesh, coordinate and placements. Pure (no I/O).

Placements apply from the first mesh dimension to the last, each dividing the part that the earlier
ones left (`torch.distributed.tensor.placement_types`):

- `Shard(d)` cuts dimension d into `ceil(n / ranks)`-sized chunks, the last ones shorter or empty;
- `_StridedShard(d, split_factor=s)` first cuts it into s such parts, then each part among the
  ranks: a rank holds its chunk of every part, one after the other. That is how FSDP shards tensors
  that tensor parallelism will shard again. Where the sizes are uneven such a shard is not one box
  of the full tensor but several;
- `Replicate()` leaves it whole.

Each dimension of the tensor is a list of runs of its indices, in the order in which the local
tensor has them; a placement replaces the list of its own dimension by the part that the rank keeps.
The rank's boxes are the products of the runs of all dimensions.

Two ranks cut 5 rows; the first gets 3, the second 2:

>>> for rank in range(2):
...     print(local_boxes((5, 2), (2,), (rank,), (Shard(0),)))
(LocalBox(offset=(0, 0), shape=(3, 2), local_offset=(0, 0)),)
(LocalBox(offset=(3, 0), shape=(2, 2), local_offset=(0, 0)),)

FSDP over tensor parallelism on a 2x2 mesh: the 8 rows are first cut for tensor parallelism (the
second mesh dimension), so FSDP (the first) takes its chunk of each of the two parts:

>>> from torch.distributed.tensor.placement_types import _StridedShard
>>> both = (_StridedShard(0, split_factor=2), Shard(0))
>>> [local_boxes((8,), (2, 2), at, both)[0].offset for at in ((0, 0), (0, 1), (1, 0), (1, 1))]
[(0,), (4,), (2,), (6,)]

With only the first placement a rank has both its chunks, one after the other in its memory:

>>> for box in local_boxes((8,), (2,), (1,), both[:1]):
...     print(box)
LocalBox(offset=(2,), shape=(2,), local_offset=(0,))
LocalBox(offset=(6,), shape=(2,), local_offset=(2,))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from torch.distributed.tensor import Partial, Placement, Shard

from pytest_dcp._torch_internals.dtensors import _StridedShard

Runs = list[tuple[int, int]]
"""Half-open index ranges of one dimension of the full tensor, in the order of the local one."""


@dataclass(frozen=True, slots=True)
class LocalBox:
    """A box of the full tensor and where the rank holds it."""

    offset: tuple[int, ...]
    """In the full tensor."""
    shape: tuple[int, ...]
    local_offset: tuple[int, ...]
    """In the rank's local tensor."""

    @property
    def whole(self) -> bool:
        """Whether it may be the rank's entire local tensor: it starts at the local tensor's
        origin."""
        return not any(self.local_offset)


def whole_box(shape: Sequence[int]) -> LocalBox:
    """The box of a tensor that the rank holds whole."""
    zeros = (0,) * len(shape)
    return LocalBox(zeros, tuple(shape), zeros)


@lru_cache(maxsize=4096)
def local_boxes(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> tuple[LocalBox, ...]:
    """The boxes that the rank at `coordinate` of the mesh holds, at least one (perhaps empty).

    Raises ValueError for a placement that does not hold the tensor's own values (Partial).
    """
    runs: list[Runs] = [[(0, n)] for n in shape]
    for ranks, rank, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, Partial) or placement.is_partial():
            raise ValueError(
                f"placement {placement!r} holds a pending reduction, not values: "
                "redistribute to Replicate() or Shard() first"
            )
        if isinstance(placement, (_StridedShard, Shard)):
            parts = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            runs[placement.dim] = shard_runs(runs[placement.dim], ranks, rank, parts)
    # An empty shard lies at the tensor's end, as in torch: clients compare these offsets.
    sides = [_join_runs(some) or [(n, n)] for some, n in zip(runs, shape, strict=True)]
    starts = [
        [sum(stop - start for start, stop in some[:i]) for i in range(len(some))] for some in sides
    ]
    return tuple(
        LocalBox(
            offset=tuple(side[i][0] for side, i in zip(sides, at, strict=True)),
            shape=tuple(side[i][1] - side[i][0] for side, i in zip(sides, at, strict=True)),
            local_offset=tuple(start[i] for start, i in zip(starts, at, strict=True)),
        )
        for at in product(*(range(len(side)) for side in sides))
    )


def shard_runs(runs: Runs, ranks: int, rank: int, parts: int = 1) -> Runs:
    """The runs of a dimension that `rank` of `ranks` keeps: its chunk of each of `parts` parts.

    >>> shard_runs([(0, 8)], ranks=2, rank=1)
    [(4, 8)]
    >>> shard_runs([(0, 8)], ranks=2, rank=1, parts=2)
    [(2, 4), (6, 8)]
    """
    length = sum(stop - start for start, stop in runs)
    own_runs: Runs = []
    for part in range(parts):
        low, high = _chunk(0, length, parts, part)
        own_runs += _cut(runs, *_chunk(low, high, ranks, rank))
    return own_runs


def _chunk(low: int, high: int, chunks: int, which: int) -> tuple[int, int]:
    """The range of a chunk of low..high as torch.chunk cuts it; past the end it is empty."""
    # Rounded up: the first chunks are full, the last ones get the rest, perhaps nothing.
    step = -(-(high - low) // chunks)
    return min(low + which * step, high), min(low + (which + 1) * step, high)


def _cut(runs: Runs, low: int, high: int) -> Runs:
    """The runs' elements number low to high - 1."""
    pieces: Runs = []
    position = 0
    for start, stop in runs:
        first, last = max(low - position, 0), min(high - position, stop - start)
        if first < last:
            pieces.append((start + first, start + last))
        position += stop - start
    return pieces


def _join_runs(runs: Runs) -> Runs:
    """The runs with neighbours joined."""
    merged: Runs = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
