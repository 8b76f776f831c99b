"""A simulated state -> the table of write items of every rank, as `plan.describe` makes them.

The state is the same on all ranks, up to placements, so the rows have the same names, kinds and
sizes on all of them. They differ in their boxes (see `layouts`) and, with `PerRank`, in the rank's
number inside a name. So the tables share every column but the offsets: ranks whose rows have
equally many boxes of the same shapes form a class, and a class has one object of each column.

Guarantees that the table of a rank equals the `write_items` of that rank's own state dict; the
tests compare them with tables of real ranks. Pure (no I/O).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor, Placement

from pytest_dcp._engine.plan.boxes import Ints, pad_rows
from pytest_dcp._engine.plan.columns import BYTES, SHARD, TENSOR, UNKNOWN, WriteItems
from pytest_dcp._engine.plan.describe import require_savable
from pytest_dcp._engine.plan.packed_names import Fqns
from pytest_dcp._engine.plan.per_rank import PerRank
from pytest_dcp._engine.plan.shards import PLAIN
from pytest_dcp._engine.simulation.layouts import RankBoxes, layout_of, whole_layout
from pytest_dcp._engine.simulation.mesh_ranks import MeshRanks
from pytest_dcp._engine.simulation.named_placements import PlacementLookup
from pytest_dcp._torch_internals.tensors import FakeTensor

OFFSET_BYTES_AT_ONCE = 1 << 22
"""Of one class's offsets that are filled together: they stay in the processor's cache."""


@dataclass(slots=True)
class StateRows:
    """The rows of a flat state dict: one for each value and tensor, before they become boxes."""

    fqns: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Positions in `property_numbers`; -1 for a value."""
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    layouts: list[int] = field(default_factory=list)
    """Positions in `boxes`."""
    boxes: list[RankBoxes] = field(default_factory=list)
    property_numbers: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        flat: Mapping[str, Any],
        lookup: PlacementLookup,
        mesh: MeshRanks,
        plain: Collection[str] = (),
    ) -> StateRows:
        """The rows of a state; `plain` names tensors to which no placement applies.

        Raises PlanError naming each value that cannot be simulated.
        """
        rows, problems = cls(), []
        layout_numbers: dict[Any, int] = {}
        for fqn, value in flat.items():
            if isinstance(value, torch.Tensor):
                if problem := find_problem(fqn, value):
                    problems.append(problem)
                    continue
                placements = None if fqn in plain else lookup.find(fqn, value)
                try:
                    rows._add_tensor(fqn, value, placements, mesh, layout_numbers)
                except ValueError as error:
                    problems.append(f"{fqn!r} cannot be saved or loaded: {error}")
            else:
                if isinstance(value, PerRank):
                    problems.append(f"{fqn!r} is a PerRank: it needs flatten_state_dict=True")
                rows._add(fqn, BYTES, UNKNOWN, (), None, mesh, layout_numbers)
        require_savable(problems)
        return rows

    def _add_tensor(
        self,
        fqn: str,
        value: torch.Tensor,
        placements: tuple[Placement, ...] | None,
        mesh: MeshRanks,
        layout_numbers: dict[Any, int],
    ) -> None:
        key = (value.dtype, value.layout, value.requires_grad)
        number = self.property_numbers.setdefault(key, len(self.property_numbers))
        kind = TENSOR if placements is None else SHARD
        self._add(fqn, kind, number, tuple(value.shape), placements, mesh, layout_numbers)

    def _add(
        self,
        fqn: str,
        kind: int,
        number: int,
        size: tuple[int, ...],
        placements: tuple[Placement, ...] | None,
        mesh: MeshRanks,
        layout_numbers: dict[Any, int],
    ) -> None:
        key = (size, placements)
        if key not in layout_numbers:
            boxes = (
                whole_layout(size, mesh.size)
                if placements is None
                else layout_of(size, placements, mesh)
            )
            layout_numbers[key] = len(self.boxes)
            self.boxes.append(boxes)
        self.fqns.append(fqn)
        self.kinds.append(kind)
        self.numbers.append(number)
        self.sizes.append(size)
        self.layouts.append(layout_numbers[key])


def find_problem(fqn: str, value: torch.Tensor) -> str | None:
    """Why the items of a tensor cannot be simulated; None if they can."""
    kind = type(value)
    if kind not in PLAIN and not isinstance(value, DTensor | FakeTensor):
        return (
            f"{fqn!r} is a {kind.__name__}, which describes its parts itself: a simulation takes "
            "plain tensors with placements=, and DTensors"
        )
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return f"{fqn!r} is not a dense tensor of plain numbers, and no save takes it as it is"
    return None


def tables_of(rows: StateRows, ranks: Ints, rank_fqns: Sequence[Fqns] | None) -> list[WriteItems]:
    """The tables of these ranks, which hold these rows.

    rank_fqns: each rank's own names of the rows; None if all ranks have the same.
    """
    class_of, first = _classify(rows, ranks)
    tables: list[WriteItems | None] = [None] * len(ranks)
    for number, leader in enumerate(first.tolist()):
        members = np.flatnonzero(class_of == number)
        template = _ClassRows.of(rows, int(ranks[leader]))
        offset = template.offsets(rows, ranks[members])
        for at, member in enumerate(members.tolist()):
            own = None if rank_fqns is None else rank_fqns[member]
            tables[member] = template.table(offset[at], own)
    return [table for table in tables if table is not None]


def _classify(rows: StateRows, ranks: Ints) -> tuple[Ints, Ints]:
    """The class of each rank, and the first rank of each class."""
    if not rows.boxes:
        return np.zeros(len(ranks), dtype=np.int64), np.zeros(min(len(ranks), 1), dtype=np.int64)
    kinds = np.stack([boxes.kind[ranks] for boxes in rows.boxes], axis=1)
    _, first, class_of = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    return class_of.reshape(-1), first


@dataclass(frozen=True, slots=True, eq=False)
class _ClassRows:
    """The columns that the ranks of one class share."""

    row_of: Ints
    """Of each box: its row of the state."""
    nth: Ints
    """Of each box: its position among the boxes of its row."""
    fqns: Fqns
    kind: NDArray[np.int8]
    properties: tuple[TensorProperties, ...]
    property_of: NDArray[np.int32]
    ndim: NDArray[np.int16]
    size: Ints
    shape: Ints
    unknown: Ints

    @classmethod
    def of(cls, rows: StateRows, rank: int) -> _ClassRows:
        """The columns of one rank of the class."""
        width = max(map(len, rows.sizes), default=0)
        counts, shapes = [], []
        for layout in rows.layouts:
            boxes = rows.boxes[layout]
            kind = boxes.kind[rank]
            count = int(boxes.count[kind])
            counts.append(count)
            shapes += boxes.shape[kind, :count].tolist()
        row_of = np.repeat(np.arange(len(counts)), counts)
        nth = np.concatenate([*map(np.arange, counts), np.zeros(0, dtype=np.int64)])
        kind_of = np.array(rows.kinds, dtype=np.int8)[row_of]
        ndim = np.fromiter(map(len, rows.sizes), np.int16, len(rows.sizes))[row_of]
        names = rows.fqns
        return cls(
            row_of=row_of,
            nth=nth.astype(np.int64),
            fqns=tuple(names[row] for row in row_of.tolist()),
            kind=kind_of,
            properties=tuple(TensorProperties(*key) for key in rows.property_numbers),
            property_of=np.array(rows.numbers, dtype=np.int32)[row_of],
            ndim=np.where(kind_of == BYTES, UNKNOWN, ndim).astype(np.int16),
            size=pad_rows(rows.sizes, width, 1)[row_of],
            shape=pad_rows(shapes, width, 1),
            unknown=np.full(len(row_of), UNKNOWN, dtype=np.int64),
        )

    def offsets(self, rows: StateRows, ranks: Ints) -> Ints:
        """(ranks, boxes, width) the offsets of the class's boxes on some of its ranks."""
        count, width = self.size.shape
        offset = np.zeros((len(ranks), count, width), dtype=np.int64)
        layouts = np.array(rows.layouts, dtype=np.int64)[self.row_of].tolist()
        step = max(OFFSET_BYTES_AT_ONCE // max(8 * count * width, 1), 1)
        for start in range(0, len(ranks), step):
            part, some = offset[start : start + step], ranks[start : start + step]
            for at, (layout, nth) in enumerate(zip(layouts, self.nth.tolist(), strict=True)):
                boxes = rows.boxes[layout].offset
                if boxes.strides[0]:  # else every rank holds it whole, at the origin
                    part[:, at, : boxes.shape[2]] = boxes[some, nth]
        return offset

    def table(self, offset: Ints, fqns: Fqns | None) -> WriteItems:
        """The table of one rank."""
        own = self.fqns
        if fqns is not None:
            own = tuple(map(fqns.__getitem__, self.row_of.tolist()))
        return WriteItems(
            fqns=own,
            kind=self.kind,
            properties=self.properties,
            property_of=self.property_of,
            ndim=self.ndim,
            size=self.size,
            offset=offset,
            shape=self.shape,
            hint=self.unknown,
            nbytes=self.unknown,
        )
