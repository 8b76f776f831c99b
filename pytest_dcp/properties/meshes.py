"""Meshes to draw: shapes, and the DeviceMesh built from each in a world.

A mesh covers the first ranks of its world, so that one world tries meshes of every size up to its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from pytest_dcp.properties.subworlds import mesh_of


@dataclass(frozen=True, slots=True)
class MeshSpec:
    """The shape of a mesh over the first ranks of a world.

    >>> mesh = MeshSpec((2, 3), ("dp", "tp"))
    >>> mesh.size, mesh.coordinate(4), mesh.coordinate(6)
    (6, (1, 1), None)
    """

    shape: tuple[int, ...] = (1,)
    dim_names: tuple[str, ...] = ()
    """One for each dimension, or none."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(self.shape)

    def build(self) -> DeviceMesh:
        """Build the mesh in this world. Collective over all ranks of the world, members or not."""
        return mesh_of(torch.arange(self.size).reshape(self.shape), self.dim_names)

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """The rank's coordinate in the mesh; None outside."""
        if rank >= self.size:
            return None
        place = []
        for side in reversed(self.shape):
            rank, at = divmod(rank, side)
            place.append(at)
        return tuple(reversed(place))


ALONE = MeshSpec()
"""The mesh of one rank."""


def meshes(world_size: int, *, max_dims: int = 2) -> st.SearchStrategy[MeshSpec]:
    """Meshes of exactly `world_size` ranks; shrink to one dimension.

    >>> from hypothesis import given
    >>> @given(meshes(4))
    ... def check(mesh):
    ...     assert mesh.shape in {(4,), (1, 4), (2, 2), (4, 1)}
    >>> check()
    """
    shapes = sorted(set(_factors(world_size, max_dims)), key=lambda shape: (len(shape), shape))
    return st.sampled_from([MeshSpec(shape) for shape in shapes])


def _factors(number: int, dims: int) -> Iterator[tuple[int, ...]]:
    """All shapes of at most `dims` sides whose product is the number."""
    yield (number,)
    if dims > 1:
        for side in range(1, number + 1):
            if number % side == 0:
                yield from ((side, *rest) for rest in _factors(number // side, dims - 1))
