"""Layouts to draw: which part of a tensor each rank of a mesh holds.

A `Layout` is a mesh and a placement for each of its dimensions. It applies to any tensor:
dimensions that the tensor lacks wrap around, and a 0-d tensor is replicated. The parts are found by
listing indices: slow, simple, and independent of an engine's arithmetic.

Two ranks hold rows of a 5x2 tensor, the first three and the last two:

>>> [places_of((5, 2), (2,), (rank,), (Shard(0),))[0].tolist() for rank in (0, 1)]
[[0, 1, 2], [3, 4]]

FSDP over tensor parallelism on a 2x2 mesh: each rank holds two rows of eight:

>>> both = (_StridedShard(0, split_factor=2), Shard(0))
>>> [places_of((8,), (2, 2), at, both)[0].tolist() for at in [(0, 0), (0, 1), (1, 0), (1, 1)]]
[[0, 1], [4, 5], [2, 3], [6, 7]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from pytest_dcp._torch_internals.dtensors import _StridedShard
from pytest_dcp.properties.bits import Bits, tensor_of
from pytest_dcp.properties.meshes import ALONE, MeshSpec, meshes
from pytest_dcp.properties.subworlds import device_type, rank
from pytest_dcp.properties.tensors import TensorSpec

Places = tuple[npt.NDArray[np.intp], ...]
"""For each dimension of the full tensor, the indices that a rank holds, in local order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which ranks of a world hold which elements of a tensor.

    >>> rows = Layout(MeshSpec((2,)), (Shard(0),))
    >>> rows.fit(ndim=2), rows.fit(ndim=0)
    ((Shard(dim=0),), (Replicate(),))
    >>> Layout().place(TensorSpec((3,)))  # no placements: a plain tensor, on every rank
    tensor([1., 2., 3.])
    """

    mesh: MeshSpec = ALONE
    placements: tuple[Placement, ...] | None = None
    """One for each dimension of the mesh; None: a plain tensor, whole, on every rank."""

    def fit(self, ndim: int) -> tuple[Placement, ...]:
        """The placements for a tensor of `ndim` dimensions."""
        return tuple(_fit(placement, ndim) for placement in self.placements or ())

    def place(self, spec: TensorSpec, device: str | None = None) -> Any:
        """This rank's tensor: a DTensor or a plain tensor. Local, once the mesh has been built."""
        device = device or device_type()
        if self.placements is None:
            return spec.build().to(device)
        coordinate = self.mesh.coordinate(rank())
        if coordinate is None:
            raise ValueError(f"rank {rank()} is not in {self.mesh!r}")
        placements = self.fit(len(spec.shape))
        local = part_of(spec.bits(), places_of(spec.shape, self.mesh.shape, coordinate, placements))
        return DTensor.from_local(
            tensor_of(local, spec.dtype, spec.memory).to(device),
            self.mesh.build(),
            placements,
            run_check=False,
            shape=spec.shape,  # type: ignore[arg-type]  # torch.Size is a tuple
            stride=_row_major(spec.shape),
        )


@st.composite
def placements(draw: st.DrawFn, mesh: MeshSpec, *, ndim: int = 3) -> tuple[Placement, ...]:
    """A placement for each dimension of the mesh; shrinks to replicas.

    Includes strided shards, as in FSDP over tensor parallelism: two dimensions of the mesh shard
    the same dimension of the tensor, the second one first.

    >>> from hypothesis import given
    >>> @given(placements(MeshSpec((2, 3))))
    ... def check(found):
    ...     assert len(found) == 2  # one for each dimension of the mesh
    >>> check()
    """
    one = st.sampled_from([Replicate(), *map(Shard, range(ndim))])
    drawn: list[Placement] = [draw(one) for _ in mesh.shape]
    for n, placement in enumerate(drawn[:-1]):
        if type(placement) is Shard and draw(st.booleans()):
            drawn[n] = _StridedShard(placement.dim, split_factor=mesh.shape[n + 1])
            drawn[n + 1] = placement
    return tuple(drawn)


@st.composite
def layouts(
    draw: st.DrawFn, mesh: MeshSpec | None = None, *, world_size: int = 4, ndim: int = 3
) -> Layout:
    """Layouts on a mesh, or on any mesh of at most `world_size` ranks.

    Shrink to a plain tensor on one rank, then to replicas, then to a shard of the first dimension.

    >>> from hypothesis import given
    >>> @given(layouts(world_size=2))
    ... def check(layout):
    ...     assert layout.mesh.size <= 2
    >>> check()
    """
    if mesh is None:
        mesh = draw(st.integers(1, world_size).flatmap(meshes))
    if draw(st.booleans()):
        return Layout(mesh, draw(placements(mesh, ndim=ndim)))
    return Layout(mesh)


@st.composite
def arrangements(
    draw: st.DrawFn, *, world_size: int = 4, max_layouts: int = 3, ndim: int = 3
) -> tuple[Layout, ...]:
    """Several layouts on one mesh, assigned in turn to the tensors of a state dict.

    >>> from hypothesis import given
    >>> @given(arrangements())
    ... def check(several):
    ...     assert len({layout.mesh for layout in several}) == 1
    >>> check()
    """
    mesh = draw(st.integers(1, world_size).flatmap(meshes))
    one = layouts(mesh, ndim=ndim)
    return tuple(draw(st.lists(one, min_size=1, max_size=max_layouts)))


def places_of(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> Places:
    """The indices of a tensor of this shape that the rank at this mesh coordinate holds."""
    places = [np.arange(side) for side in shape]
    for ranks, at, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if isinstance(placement, _StridedShard):
            parts = [_chunk(part, ranks, at) for part in _chunks(places[placement.dim], placement)]
            places[placement.dim] = np.concatenate(parts)
        elif isinstance(placement, Shard):
            places[placement.dim] = _chunk(places[placement.dim], ranks, at)
        elif not isinstance(placement, Replicate):
            raise TypeError(f"expected Shard or Replicate, got {placement!r}")
    return tuple(places)


def part_of(bits: Bits, places: Places) -> Bits:
    """The bits of the elements at these indices of each dimension."""
    for dim, indices in enumerate(places):
        bits = bits.take(indices, axis=dim)
    return bits


def _chunks(indices: npt.NDArray[np.intp], placement: _StridedShard) -> list[npt.NDArray[np.intp]]:
    count = int(placement.split_factor)
    return [_chunk(indices, count, which) for which in range(count)]


def _chunk(indices: npt.NDArray[np.intp], count: int, which: int) -> npt.NDArray[np.intp]:
    """Chunks as by torch.chunk, padded with empty chunks."""
    side = -(-len(indices) // count)
    return indices[which * side : (which + 1) * side]


def _fit(placement: Placement, ndim: int) -> Placement:
    if isinstance(placement, Replicate) or not ndim:
        return Replicate()
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim % ndim, split_factor=placement.split_factor)
    if isinstance(placement, Shard):
        return Shard(placement.dim % ndim)
    raise TypeError(f"expected Shard or Replicate, got {placement!r}")


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return tuple(reversed(strides))
