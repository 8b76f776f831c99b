"""The boxes of one tensor on all ranks of a simulated mesh. Pure (no I/O).

The boxes are those of `plan.placement_boxes.local_boxes`, which a rank asks for its own coordinate.
A placement that does not shard ignores its coordinate, so ranks that differ only in such
coordinates hold the same boxes: `local_boxes` is asked once for each coordinate that matters.

Three ranks cut five rows:

>>> layout = layout_of((5, 2), (Shard(0),), MeshRanks.of(3))
>>> layout.offset[:, 0].tolist(), layout.shape[layout.kind, 0].tolist()
([[0, 0], [2, 0], [4, 0]], [[2, 2], [2, 2], [1, 2]])

On a 2x2 mesh whose first dimension replicates, ranks 0 and 2 hold the same rows:

>>> from torch.distributed.tensor import Replicate
>>> both = layout_of((4, 2), (Replicate(), Shard(0)), MeshRanks.of((2, 2)))
>>> both.offset[:, 0].tolist()
[[0, 0], [2, 0], [0, 0], [2, 0]]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.distributed.tensor import Placement, Shard

from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.placement_boxes import local_boxes
from pytest_dcp._engine.simulation.mesh_ranks import MeshRanks
from pytest_dcp._torch_internals.dtensors import _StridedShard


@dataclass(frozen=True, slots=True, eq=False)
class RankBoxes:
    """The boxes of a tensor of k dimensions that each rank holds, at most m on one rank."""

    count: Ints
    """(kinds,) boxes on a rank of each kind."""
    shape: Ints
    """(kinds, m, k) of the boxes on a rank of each kind."""
    kind: NDArray[np.int32]
    """(ranks,) ranks of one kind hold equally many boxes, of the same shapes."""
    offset: Ints
    """(ranks, m, k)"""


def layout_of(
    size: tuple[int, ...], placements: tuple[Placement, ...], mesh: MeshRanks
) -> RankBoxes:
    """The boxes of a tensor on every rank. Raises ValueError for a pending reduction."""
    matters = np.array([isinstance(p, (Shard, _StridedShard)) for p in placements], dtype=bool)
    at = np.where(matters, mesh.coordinates, 0)
    sites, site_of = np.unique(at, axis=0, return_inverse=True)
    found = [local_boxes(size, mesh.shape, tuple(site), placements) for site in sites.tolist()]
    most, dims = max(map(len, found)), len(size)
    offset = np.zeros((len(found), most, dims), dtype=np.int64)
    kinds: dict[tuple[tuple[int, ...], ...], int] = {}
    kind = np.empty(len(found), dtype=np.int32)
    for site, boxes in enumerate(found):
        for n, box in enumerate(boxes):
            offset[site, n] = box.offset
        shapes = tuple(box.shape for box in boxes)
        kind[site] = kinds.setdefault(shapes, len(kinds))
    shape = np.ones((len(kinds), most, dims), dtype=np.int64)
    for shapes, number in kinds.items():
        for n, one in enumerate(shapes):
            shape[number, n] = one
    site_of = site_of.reshape(-1)
    count = np.array([len(shapes) for shapes in kinds], dtype=np.int64)
    return RankBoxes(count, shape, kind[site_of], offset[site_of])


def whole_layout(size: tuple[int, ...], ranks: int) -> RankBoxes:
    """The layout of a tensor that every rank holds whole, or of a value, which has no size."""
    dims = len(size)
    return RankBoxes(
        count=np.ones(1, dtype=np.int64),
        shape=np.array(size, dtype=np.int64).reshape(1, 1, dims),
        kind=np.zeros(ranks, dtype=np.int32),
        offset=np.broadcast_to(np.zeros((1, 1, dims), dtype=np.int64), (ranks, 1, dims)),
    )
