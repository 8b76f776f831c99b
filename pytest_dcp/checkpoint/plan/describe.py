"""A flat state dict -> what this rank writes (`WriteItems`) or wants (`Wanted`), as columns.

Both read the same parts of the same tensors; only the questions differ. Every problem of a state
dict is named at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pytest_dcp.checkpoint.plan.boxes import Ints, padded
from pytest_dcp.checkpoint.plan.columns import BYTES, SHARD, TENSOR, UNKNOWN, WriteItems
from pytest_dcp.checkpoint.plan.names import Fqns
from pytest_dcp.checkpoint.plan.shards import (
    PLAIN,
    SPEAKS_FOR_ITSELF,
    Layouts,
    local_shards,
    local_tensor,
    speaks_for_itself,
    spokesman,
)
from pytest_dcp.errors import PlanError

Box = tuple[Sequence[int], Sequence[int]]
"""Offset and shape in the full tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The boxes that a rank wants to load, one row a box; a byte value has no dimensions."""

    fqns: Fqns
    ndim: NDArray[np.int16]
    """-1 for a byte value."""
    offset: Ints
    shape: Ints
    nth: Ints
    """The box's position among the rank's boxes of the same name."""

    def __len__(self) -> int:
        return len(self.fqns)


class _Rows:
    """Rows in the making: one list a column."""

    def __init__(self) -> None:
        self.fqns: list[str] = []
        self.kind: list[int] = []
        self.property_of: list[int] = []
        self.size: list[Sequence[int]] = []
        self.boxes: list[Box] = []
        self.known: dict[Any, int] = {}
        self.layouts = Layouts()

    def add(self, fqn: str, kind: int, tensor: torch.Tensor | None, size: Any, box: Box) -> None:
        self.fqns.append(fqn)
        self.kind.append(kind)
        self.size.append(size)
        self.boxes.append(box)
        self.property_of.append(UNKNOWN if tensor is None else self._property(tensor))

    def _property(self, tensor: torch.Tensor) -> int:
        key = (tensor.dtype, tensor.layout, tensor.requires_grad)
        return self.known.setdefault(key, len(self.known))

    def items(self) -> WriteItems:
        rank = max(map(len, self.size), default=0)
        kind = np.array(self.kind, dtype=np.int8)
        ndim = np.array([len(size) for size in self.size], dtype=np.int16)
        count = len(self.fqns)
        return WriteItems(
            fqns=tuple(self.fqns),
            kind=kind,
            properties=tuple(TensorProperties(*key) for key in self.known),
            property_of=np.array(self.property_of, dtype=np.int32),
            ndim=np.where(kind == BYTES, UNKNOWN, ndim).astype(np.int16),
            size=padded(self.size, rank, 1),
            offset=padded([box[0] for box in self.boxes], rank, 0),
            shape=padded([box[1] for box in self.boxes], rank, 1),
            hint=np.full(count, UNKNOWN, dtype=np.int64),
            nbytes=np.full(count, UNKNOWN, dtype=np.int64),
        )


NOTHING: Box = ((), ())
ORIGINS = tuple((0,) * rank for rank in range(65))
"""The offset of a whole tensor, by its number of dimensions (torch has at most 64)."""


def write_items(state_dict: Mapping[str, Any]) -> WriteItems:
    """One row for each box of a tensor that this rank holds, and for each value.

    Raises PlanError naming every value that cannot be saved.
    """
    rows = _Rows()
    problems: list[str] = []
    spoken: list[WriteItems] = []
    for fqn, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            rows.add(fqn, BYTES, None, (), NOTHING)
        elif type(value) in PLAIN and _dense(value):
            # What nearly every value is, without the questions below.
            shape = value.shape
            rows.add(fqn, TENSOR, value, shape, (ORIGINS[len(shape)], shape))
        elif _plain_dtensor(value) and _dense(local_tensor(value)):
            _add_dtensor(rows, fqn, value, problems)
        elif problem := unsavable(fqn, value):
            problems.append(problem)
        elif speaks_for_itself(value):
            spoken.append(WriteItems.of(spokesman(value).__create_write_items__(fqn, value)))
        elif isinstance(value, ShardedTensor):
            full = tuple(value.metadata().size)
            for box, memory in local_shards(value):
                rows.add(fqn, SHARD, memory, full, (box.offset, box.shape))
        elif isinstance(value, DTensor):
            _add_dtensor(rows, fqn, value, problems)
        else:
            shape = value.shape
            rows.add(fqn, TENSOR, value, shape, (ORIGINS[len(shape)], shape))
    if problems:
        raise PlanError(f"{len(problems)} value(s) cannot be saved:\n" + "\n".join(problems))
    if not spoken:
        return rows.items()
    return WriteItems.of([item for table in (rows.items(), *spoken) for item in table])


def _add_dtensor(rows: _Rows, fqn: str, value: DTensor, problems: list[str]) -> None:
    full = value.shape
    try:
        for box in rows.layouts.sides_of(fqn, value):
            rows.add(fqn, SHARD, value, full, box)
    except PlanError as error:
        problems.append(str(error))


def _plain_dtensor(value: torch.Tensor) -> TypeGuard[DTensor]:
    return type(value) is DTensor and type(local_tensor(value)) in PLAIN


def _dense(value: torch.Tensor) -> bool:
    return value.is_cpu and value.layout is torch.strided and not value.is_quantized


def unsavable(fqn: str, value: Any) -> str | None:
    """Why a tensor has no bytes that could be saved, or None."""
    if isinstance(value, ShardedTensor):
        return None
    memory: Any = local_tensor(value) if isinstance(value, DTensor) else value
    if memory.is_meta or isinstance(memory, FakeTensor):
        return f"{fqn!r} is on the meta device, or fake, and has no values: materialise it first"
    if memory.layout is not torch.strided:
        return f"{fqn!r} has layout {memory.layout}: save its to_dense()"
    if memory.is_quantized:
        return f"{fqn!r} is quantized ({memory.dtype}): save its int_repr(), scale and zero point"
    if is_traceable_wrapper_subclass(memory) and not speaks_for_itself(value):
        return (
            f"{fqn!r} is a {type(memory).__name__}, a wrapper without memory of its own: "
            f"give the class {', '.join(SPEAKS_FOR_ITSELF)}, or save its inner tensors"
        )
    return None


def wanted_boxes(state_dict: Mapping[str, Any]) -> Wanted:
    """One row for each box of a tensor that this rank wants filled, and for each value.

    Raises PlanError for a DTensor with a pending reduction.
    """
    fqns: list[str] = []
    boxes: list[Box] = []
    ndim: list[int] = []
    nth: list[int] = []
    layouts = Layouts()
    for fqn, value in state_dict.items():
        tensor = isinstance(value, torch.Tensor)
        found = _boxes_wanted(fqn, value, layouts) if tensor else (NOTHING,)
        for n, box in enumerate(found):
            fqns.append(fqn)
            boxes.append(box)
            ndim.append(len(box[1]) if tensor else UNKNOWN)
            nth.append(n)
    rank = max(0, *ndim) if ndim else 0
    return Wanted(
        fqns=tuple(fqns),
        ndim=np.array(ndim, dtype=np.int16),
        offset=padded([box[0] for box in boxes], rank, 0),
        shape=padded([box[1] for box in boxes], rank, 1),
        nth=np.array(nth, dtype=np.int64),
    )


def _boxes_wanted(fqn: str, value: Any, layouts: Layouts) -> Sequence[Box]:
    if type(value) in PLAIN:
        shape = value.shape
        return ((ORIGINS[len(shape)], shape),)
    if _plain_dtensor(value):
        return layouts.sides_of(fqn, value)
    if speaks_for_itself(value):
        chunks = spokesman(value).__create_chunk_list__()
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]
    if isinstance(value, ShardedTensor):
        return [(box.offset, box.shape) for box, _ in local_shards(value)]
    if isinstance(value, DTensor):
        return layouts.sides_of(fqn, value)
    shape = value.shape
    return ((ORIGINS[len(shape)], shape),)
