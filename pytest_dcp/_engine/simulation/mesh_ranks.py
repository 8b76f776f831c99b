"""A simulated mesh: its shape, and which rank is at each coordinate. Pure (no I/O).

>>> mesh = MeshRanks.of((2, 3))
>>> mesh.size, mesh.coordinates.tolist()
(6, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.distributed.device_mesh import DeviceMesh

from pytest_dcp._engine.plan.boxes import Ints

Mesh = int | Sequence[int] | DeviceMesh
"""A number of ranks, a mesh's shape (ranks in row-major order), or a mesh of the whole world."""

MAX_RANKS = 1 << 17
"""A larger world is a typing error: the plan of 1,000 tensors would take 30 GB."""


@dataclass(frozen=True, slots=True, eq=False)
class MeshRanks:
    """A mesh that has every rank of the world once."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    """Of its dimensions; empty if they have none."""
    coordinates: Ints
    """(ranks, dimensions) of each rank."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.coordinates)

    @classmethod
    def of(cls, mesh: Mesh) -> MeshRanks:
        """The mesh that a caller describes. Raises ValueError if it cannot be simulated."""
        if isinstance(mesh, DeviceMesh):
            return cls._of_device_mesh(mesh)
        sides = [mesh] if isinstance(mesh, int) else list(mesh)
        if not sides or not all(type(side) is int and side >= 1 for side in sides):
            raise ValueError(
                "a mesh is a number of ranks, a shape such as (8, 4), or a DeviceMesh; got "
                f"{mesh!r}"
            )
        size = math.prod(sides)
        if size > MAX_RANKS:
            raise ValueError(
                f"a mesh of {size:,} ranks cannot be simulated: at most {MAX_RANKS:,} can"
            )
        at = np.unravel_index(np.arange(size), tuple(sides))
        return cls(tuple(sides), (), np.stack(at, axis=1).astype(np.int64))

    @classmethod
    def _of_device_mesh(cls, mesh: DeviceMesh) -> MeshRanks:
        shape = tuple(mesh.shape)
        ranks = np.array(mesh.mesh.flatten().tolist(), dtype=np.int64)
        size = len(ranks)
        if not np.array_equal(np.sort(ranks), np.arange(size)):
            raise ValueError(
                f"the mesh {mesh} leaves ranks out: a simulation takes a mesh that has every rank "
                f"from 0 to n - 1 once"
            )
        at = np.stack(np.unravel_index(np.arange(size), shape), axis=1)
        coordinates = np.empty_like(at, dtype=np.int64)
        coordinates[ranks] = at
        return cls(shape, tuple(mesh.mesh_dim_names or ()), coordinates)
