"""Which placements each tensor of a simulated state has. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from pytest_dcp._engine.simulation.mesh_ranks import MeshRanks
from pytest_dcp._torch_internals.dtensors import _StridedShard

TensorPlacements = Sequence[Placement]
Placements = (
    TensorPlacements
    | Mapping[str, TensorPlacements | None]
    | Callable[[str, torch.Tensor], TensorPlacements | None]
    | None
)
"""One list for all tensors; a list for each flat name or pattern of `fnmatch` (the first that
matches counts); or a function of name and tensor. None, and a name without a pattern: a plain
tensor, which every rank holds whole."""


class PlacementLookup:
    """Finds and checks the placements of tensors."""

    def __init__(self, placements: Placements, mesh: MeshRanks) -> None:
        self._placements = placements
        self._mesh = mesh
        self._unused = set(placements) if isinstance(placements, Mapping) else set()

    def find(self, fqn: str, tensor: torch.Tensor) -> tuple[Placement, ...] | None:
        """The placements of a tensor on the whole mesh; None for a plain tensor.

        Raises ValueError, naming the tensor, for placements that do not fit it or the mesh.
        """
        if isinstance(tensor, DTensor):
            found: TensorPlacements | None = self._own_placements(fqn, tensor)
        elif callable(self._placements):
            found = self._placements(fqn, tensor)
        elif isinstance(self._placements, Mapping):
            found = self._match_pattern(self._placements, fqn)
        else:
            found = self._placements
        return None if found is None else self._check(fqn, tensor, tuple(found))

    def check_patterns(self) -> None:
        """Raise ValueError for names and patterns that have matched no tensor."""
        if self._unused:
            raise ValueError(
                f"no tensor of the state is called {', '.join(map(repr, sorted(self._unused)))}: "
                "placements= has the flat names of tensors, or patterns such as 'layers.*.weight'"
            )

    def _match_pattern(
        self, by_name: Mapping[str, TensorPlacements | None], fqn: str
    ) -> TensorPlacements | None:
        pattern = fqn if fqn in by_name else None
        if pattern is None:
            pattern = next((one for one in by_name if fnmatchcase(fqn, one)), None)
        if pattern is None:
            return None
        self._unused.discard(pattern)
        return by_name[pattern]

    def _own_placements(self, fqn: str, tensor: DTensor) -> tuple[Placement, ...]:
        """A DTensor's placements, on the whole mesh if it is on a part of it."""
        mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names or ()
        own_shape = tuple(mesh.shape)
        if own_shape == self._mesh.shape:
            return tuple(tensor.placements)
        whole: list[Placement] = [Replicate() for _ in self._mesh.shape]
        for name, side, placement in zip(names, own_shape, tensor.placements, strict=False):
            at = self._mesh.names.index(name) if name in self._mesh.names else -1
            if at < 0 or self._mesh.shape[at] != side:
                break
            whole[at] = placement
        else:
            if names:
                return tuple(whole)
        raise ValueError(
            f"{fqn!r} is a DTensor on a mesh of shape {own_shape}, which is neither the simulated "
            f"mesh {self._mesh.shape} nor, by the names of its dimensions, a part of it"
        )

    def _check(
        self, fqn: str, tensor: torch.Tensor, placements: tuple[Placement, ...]
    ) -> tuple[Placement, ...]:
        if len(placements) != len(self._mesh.shape):
            raise ValueError(
                f"{fqn!r} has {len(placements)} placements {placements!r}, and the mesh "
                f"{self._mesh.shape} has {len(self._mesh.shape)} dimensions: give one for each"
            )
        return tuple(_normalise(fqn, tensor, placement) for placement in placements)


def _normalise(fqn: str, tensor: torch.Tensor, placement: Placement) -> Placement:
    """The placement with a dimension of 0 or more, as DTensor keeps it."""
    if isinstance(placement, (Shard, _StridedShard)):
        dims = tensor.ndim
        if not -dims <= placement.dim < dims:
            raise ValueError(
                f"{fqn!r} has the shape {tuple(tensor.shape)}, and {placement!r} shards dimension "
                f"{placement.dim}"
            )
        if type(placement) is Shard and placement.dim < 0:
            return Shard(placement.dim + dims)
        return placement
    if not isinstance(placement, (Replicate, Partial)):
        raise ValueError(  # noqa: TRY004 - about the value of an argument
            f"{fqn!r} has the placement {placement!r}, which cannot be simulated: Shard, Replicate "
            "and FSDP2's strided shards can"
        )
    return placement
