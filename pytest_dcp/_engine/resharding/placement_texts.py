"""Meshes and placements as a command line gives them. Pure (no I/O).

>>> parse_mesh("4x2")
(4, 2)
>>> rules = PlacementRules.parse(["S0,R", "*.wq=R,S(1)"], dims=2)
>>> rules.find("layers.0.wq", 2), rules.find("bias", 1), rules.find("step", 0)
((Replicate(), Shard(dim=1)), (Shard(dim=0), Replicate()), None)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch.distributed.tensor import Placement, Replicate, Shard

Row = tuple[Placement, ...]
SHARD = re.compile(r"S\(?(\d+)\)?")


def parse_mesh(text: str) -> tuple[int, ...]:
    """The shape of a mesh. Raises ValueError for another text than `4x2`."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise ValueError(f"a mesh is its sides, such as 8 or 4x2; got {text!r}")
    return tuple(map(int, text.split("x")))


@dataclass
class PlacementRules:
    """Which placements each tensor gets."""

    default: Row
    """Where it shards a dimension that a tensor does not have, the tensor is replicated."""
    by_pattern: dict[str, Row] = field(default_factory=dict)
    """Of names and patterns; the first that matches counts."""
    unused: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, texts: Sequence[str], dims: int) -> PlacementRules:
        """From texts such as `S0,R`, for all tensors, and `PATTERN=S0,R`.

        dims: of the mesh, each of which needs one placement. Raises ValueError for another text.
        """
        default: Row | None = None
        by_pattern: dict[str, Row] = {}
        for text in texts:
            pattern, sign, row = text.rpartition("=")
            if sign:
                by_pattern[pattern] = _parse_row(row, dims)
            elif default is None:
                default = _parse_row(row, dims)
            else:
                raise ValueError(f"placements for all tensors are given twice: {text!r}")
        if default is None:
            default = tuple(Replicate() for _ in range(dims))
        return cls(default, by_pattern, set(by_pattern))

    def find(self, name: str, ndim: int) -> Row | None:
        """The placements of a tensor with `ndim` dimensions; None: every rank holds it whole."""
        for pattern, row in self.by_pattern.items():
            if name == pattern or fnmatchcase(name, pattern):
                self.unused.discard(pattern)
                return row
        row = tuple(
            Replicate() if isinstance(one, Shard) and one.dim >= ndim else one
            for one in self.default
        )
        return row if any(isinstance(one, Shard) for one in row) else None

    def check_patterns(self, where: str) -> None:
        """Raise ValueError for patterns that have matched no tensor."""
        if self.unused:
            names = ", ".join(map(repr, sorted(self.unused)))
            raise ValueError(f"placements for {names} match no tensor of {where}")


def _parse_row(text: str, dims: int) -> Row:
    row = tuple(_parse_placement(one.strip(), text) for one in text.split(","))
    if len(row) != dims:
        raise ValueError(
            f"the mesh has {dims} dimensions, and {text!r} {len(row)} placements: give one for each"
        )
    return row


def _parse_placement(text: str, row: str) -> Placement:
    if text == "R":
        return Replicate()
    if match := SHARD.fullmatch(text):
        return Shard(int(match[1]))
    raise ValueError(f"a placement is R, or S and a dimension, such as S0; got {text!r} in {row!r}")
