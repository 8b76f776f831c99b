"""A flat state dict -> the items that this rank writes (`WriteItems`) or wants (`Wanted`), as
columns.

Both read the same parts of the same tensors, but record different facts. All problems of a state
dict are reported in one error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.boxes import Ints, pad_rows
from pytest_dcp._engine.plan.columns import BYTES, SHARD, TENSOR, UNKNOWN, WriteItems
from pytest_dcp._engine.plan.declared_parts import (
    BOXES,
    declared_boxes,
    declares_parts,
    global_shape,
)
from pytest_dcp._engine.plan.opaque import (
    HOOK,
    inner_nbytes,
    inner_problem,
    is_opaque,
    is_wrapper,
    what_no_file_holds,
)
from pytest_dcp._engine.plan.packed_names import Fqns
from pytest_dcp._engine.plan.per_rank import PerRank
from pytest_dcp._engine.plan.shards import (
    DESCRIBING_HOOKS,
    PLAIN,
    Layouts,
    describes_its_parts,
    local_shards,
    own_chunks,
    own_write_items,
)
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp._torch_internals.tensors import FakeTensor
from pytest_dcp.errors import PlanError

Box = tuple[Sequence[int], Sequence[int]]
"""Offset and shape in the full tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The boxes that a rank wants to load, one row per box; a byte value has no dimensions."""

    fqns: Fqns
    ndim: NDArray[np.int16]
    """-1 for a byte value."""
    offset: Ints
    shape: Ints
    nth: Ints
    """The box's position among the rank's boxes of the same name."""
    wrappers: frozenset[str] = frozenset()
    """Names of wrappers of other tensors, and of DTensors of them."""
    self_described: frozenset[str] = frozenset()
    """Names of tensors that describe their own parts."""

    def __len__(self) -> int:
        return len(self.fqns)


class _Rows:
    """Rows in the making, and the values that cannot have any."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.self_described: list[WriteItems] = []
        """Tables of tensors that describe their own items."""
        self.rows: list[tuple[str, int, int, Sequence[int], Box]] = []
        """Name, kind, property, size of the full tensor, box."""
        self.property_numbers: dict[Any, int] = {}
        self.layouts = Layouts()
        self.wrappers: dict[int, int] = {}
        """Rows that are wrappers of other tensors, and the bytes of these."""

    def add(self, fqn: str, kind: int, number: int, size: Sequence[int], box: Box) -> None:
        self.rows.append((fqn, kind, number, size, box))

    def add_tensor(self, fqn: str, tensor: torch.Tensor, number: int) -> None:
        shape = tensor.shape
        self.add(fqn, TENSOR, number, shape, (ORIGINS[len(shape)], shape))

    def add_value(self, fqn: str) -> None:
        self.add(fqn, BYTES, UNKNOWN, (), NOTHING)

    def add_dtensor(self, fqn: str, value: DTensor, number: int) -> None:
        try:
            local_boxes = self.layouts.boxes_of(fqn, value)
        except PlanError as error:
            self.problems.append(str(error))
            return
        for box in local_boxes.sides:
            self.rows.append((fqn, SHARD, number, local_boxes.size, box))

    def add_wrapper(self, fqn: str, value: DTensor, wrapper: torch.Tensor) -> None:
        """The row of a DTensor whose local tensor is a wrapper, which is stored whole."""
        first = len(self.rows)
        self.add_dtensor(fqn, value, self.property_of(value, wrapper))
        added = self.rows[first:]
        if any(tuple(box[1]) != tuple(wrapper.shape) for *_, box in added):
            self.problems.append(
                f"{fqn!r} is a {type(wrapper).__name__} of size {tuple(wrapper.shape)} here, which "
                f"stands for boxes of {[tuple(box[1]) for *_, box in added]}: a wrapper of other "
                "tensors must be one box"
            )
        self.wrappers[first] = inner_nbytes(wrapper)

    def add_shards(self, fqn: str, value: ShardedTensor) -> None:
        size = tuple(value.metadata().size)
        for box, memory in local_shards(value):
            if problem := find_save_problem(fqn, memory):
                self.problems.append(problem)
            else:
                number = self.property_of(memory, memory)
                self.add(fqn, SHARD, number, size, (box.offset, box.shape))

    def add_parts(self, fqn: str, value: Any) -> None:
        number = self.property_of(value, value)
        try:
            size = global_shape(fqn, value)
            for box in declared_boxes(fqn, value):
                self.add(fqn, SHARD, number, size, (box.offset, box.shape))
        except PlanError as error:
            self.problems.append(str(error))

    def add_unusual(self, fqn: str, value: torch.Tensor) -> None:
        """The rows of a tensor whose class or attributes may change what it stores."""
        if is_opaque(value) and not value.is_meta:
            self.add_value(fqn)
        elif problem := find_save_problem(fqn, value):
            self.problems.append(problem)
        elif describes_its_parts(value):
            try:
                self.self_described.append(WriteItems.of(own_write_items(fqn, value)))
            except PlanError as error:
                self.problems.append(str(error))
        elif isinstance(value, ShardedTensor):
            self.add_shards(fqn, value)
        elif declares_parts(value):
            self.add_parts(fqn, value)
        elif isinstance(value, DTensor):
            memory = local_tensor(value)
            if is_wrapper(memory):
                self.add_wrapper(fqn, value, memory)
            else:
                self.add_dtensor(fqn, value, self.property_of(value, memory))
        else:
            self.add_tensor(fqn, value, self.property_of(value, value))

    def new_property_of(self, fqn: str, value: Any, memory: torch.Tensor) -> int | None:
        """The property of a tensor like no earlier one; None if it is stored as a value, or not at
        all, which is recorded.
        """
        if is_opaque(value) and not value.is_meta:
            self.add_value(fqn)
        elif problem := find_save_problem(fqn, value):
            self.problems.append(problem)
        else:
            return self.property_of(value, memory)
        return None

    def property_of(self, value: torch.Tensor, memory: torch.Tensor) -> int:
        """The position of the properties of a tensor that is kept in this memory."""
        key = (memory.dtype, memory.layout, value.requires_grad)
        return self.property_numbers.setdefault(key, len(self.property_numbers))

    def known_property_of(self, value: torch.Tensor, memory: torch.Tensor) -> int | None:
        """Like `property_of`; None if no earlier tensor had these, or the memory is not on the CPU.

        Whether tensors with given properties can be saved needs only one check.
        """
        layout = memory.layout
        if layout is not torch.strided or not memory.is_cpu:
            return None
        return self.property_numbers.get((memory.dtype, layout, value.requires_grad))

    def items(self) -> WriteItems:
        """The table of all rows; raises PlanError if there are problems."""
        require_savable(self.problems)
        table = self._table()
        # Tables of items that tensors made themselves are rare, so they are joined item by item.
        if not self.self_described:
            return table
        return WriteItems.of([item for some in (table, *self.self_described) for item in some])

    def _table(self) -> WriteItems:
        fqns, kinds, numbers, sizes, boxes = (
            zip(*self.rows, strict=True) if self.rows else ((),) * 5
        )
        rank = max(map(len, sizes), default=0)
        nbytes = np.full(len(fqns), UNKNOWN, dtype=np.int64)
        for row, inner_bytes in self.wrappers.items():
            nbytes[row] = inner_bytes
        kind = np.array(kinds, dtype=np.int8)
        ndim = np.fromiter(map(len, sizes), np.int16, len(sizes))
        count = len(fqns)
        return WriteItems(
            fqns=fqns,
            kind=kind,
            properties=tuple(TensorProperties(*key) for key in self.property_numbers),
            property_of=np.array(numbers, dtype=np.int32),
            ndim=np.where(kind == BYTES, UNKNOWN, ndim).astype(np.int16),
            size=pad_rows(sizes, rank, 1),
            offset=pad_rows([box[0] for box in boxes], rank, 0),
            shape=pad_rows([box[1] for box in boxes], rank, 1),
            hint=np.full(count, UNKNOWN, dtype=np.int64),
            nbytes=nbytes,
        )


NOTHING: Box = ((), ())
ORIGINS = tuple((0,) * rank for rank in range(65))
"""The offset of a whole tensor, by its number of dimensions (torch has at most 64)."""


def write_items(state_dict: Mapping[str, Any]) -> WriteItems:
    """One row for each box of a tensor that this rank holds, and for each value.

    Raises PlanError naming every value that cannot be saved.
    """
    rows = _Rows()
    for fqn, value in state_dict.items():
        kind = type(value)
        memory = local_tensor(value) if kind is DTensor else value
        if (
            type(memory) in PLAIN
            # A program may set the hook on the local tensor alone.
            and not hasattr(memory, HOOK if kind is DTensor else BOXES)
        ):
            # The ordinary kinds of values, inline: a call per tensor would cost more than the rest.
            number = rows.known_property_of(value, memory)
            if number is None and (number := rows.new_property_of(fqn, value, memory)) is None:
                continue
            if kind is DTensor:
                rows.add_dtensor(fqn, value, number)
            elif memory.is_nested:  # It looks like other tensors, but has no shape.
                rows.problems.append(f"{what_no_file_holds(fqn, value)}")
            else:
                rows.add_tensor(fqn, value, number)
        elif isinstance(value, torch.Tensor):
            rows.add_unusual(fqn, value)
        else:
            if isinstance(value, PerRank):
                rows.problems.append(f"{fqn!r} is a PerRank: it needs flatten_state_dict=True")
            rows.add_value(fqn)
    return rows.items()


def require_savable(problems: Sequence[str]) -> None:
    """Raise PlanError for values that cannot be saved, if there are any."""
    if problems:
        raise PlanError(f"{len(problems)} value(s) cannot be saved:\n" + "\n".join(problems))


def find_save_problem(fqn: str, value: Any) -> str | None:
    """Why a tensor has no bytes to save, or None."""
    if isinstance(value, ShardedTensor):
        return None
    memory: Any = local_tensor(value) if isinstance(value, DTensor) else value
    if memory.is_nested:
        return what_no_file_holds(fqn, memory)
    if memory.is_meta or isinstance(memory, FakeTensor):
        return f"{fqn!r} is on the meta device, or fake, and has no values: materialise it first"
    if problem := what_no_file_holds(fqn, memory):
        return problem
    if is_wrapper(memory) and not describes_its_parts(value):
        if isinstance(value, DTensor):  # The wrapper is a part, stored as torch pickles it.
            return inner_problem(fqn, memory, find_save_problem)
        return (
            f"{fqn!r} is a {type(memory).__name__}, a wrapper without memory of its own: "
            f"give the class {', '.join(DESCRIBING_HOOKS)}, or save its inner tensors"
        )
    return None


def wanted_boxes(state_dict: Mapping[str, Any]) -> Wanted:
    """One row for each box of a tensor that this rank wants filled, and for each value.

    Raises PlanError for a DTensor with a pending reduction.
    """
    rows: list[tuple[str, Box, int, int]] = []
    layouts = Layouts()
    wrappers: list[str] = []
    self_described: list[str] = []
    for fqn, value in state_dict.items():
        kind = type(value)
        found: Sequence[Box]
        memory = local_tensor(value) if kind is DTensor else value
        if kind is DTensor and type(memory) in PLAIN and not hasattr(memory, HOOK):
            found = layouts.boxes_of(fqn, value).sides
        elif kind in PLAIN or isinstance(value, torch.Tensor):
            found = _list_wanted_boxes(fqn, value, layouts)
            if kind not in PLAIN:
                if describes_its_parts(value):
                    self_described.append(fqn)
                elif is_wrapper(memory):
                    wrappers.append(fqn)
        else:
            rows.append((fqn, NOTHING, UNKNOWN, 0))
            continue
        for n, box in enumerate(found):
            rows.append((fqn, box, len(box[1]), n))
    fqns, boxes, ndim, nth = zip(*rows, strict=True) if rows else ((),) * 4
    rank = max(0, *ndim) if ndim else 0
    return Wanted(
        fqns=fqns,
        ndim=np.array(ndim, dtype=np.int16),
        offset=pad_rows([box[0] for box in boxes], rank, 0),
        shape=pad_rows([box[1] for box in boxes], rank, 1),
        nth=np.array(nth, dtype=np.int64),
        wrappers=frozenset(wrappers),
        self_described=frozenset(self_described),
    )


def _list_wanted_boxes(fqn: str, value: Any, layouts: Layouts) -> Sequence[Box]:
    if type(value) in PLAIN and not hasattr(value, BOXES):
        shape = value.shape
        return ((ORIGINS[len(shape)], shape),)
    if describes_its_parts(value):
        chunks = own_chunks(fqn, value)
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    if isinstance(value, ShardedTensor):
        return [(box.offset, box.shape) for box, _ in local_shards(value)]
    if declares_parts(value):
        return [(box.offset, box.shape) for box in declared_boxes(fqn, value)]
    if isinstance(value, DTensor):
        return layouts.boxes_of(fqn, value).sides
    shape = value.shape
    return ((ORIGINS[len(shape)], shape),)
