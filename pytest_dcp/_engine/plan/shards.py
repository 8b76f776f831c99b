"""The boxes of full tensors that this rank's state dict holds, and the memory of each.

A plain tensor is one box, the whole, unless its attributes declare others (`declared_parts`).
DTensor and ShardedTensor hold parts. Any other tensor class may describe its own parts with
the methods that torch's DTensor also has: `__create_write_items__(fqn, object)`,
`__create_chunk_list__()` and `__get_tensor_shard__(index)`.

A box has two positions: in the full tensor (`offset`), which the checkpoint stores, and in this
rank's memory (`local_offset`), which it does not store. Reading and writing go through `part_of`, a
view of the memory.

>>> whole = torch.arange(8).reshape(4, 2)
>>> boxes_of("w", whole)
(LocalBox(offset=(0, 0), shape=(4, 2), local_offset=(0, 0)),)

A local tensor of three rows whose last two are rows 2 and 3 of `w`:

>>> local = torch.cat([torch.full((1, 2), -1), whole[2:]])
>>> part_of(local, LocalBox(offset=(2, 0), shape=(2, 2), local_offset=(1, 0)))
tensor([[4, 5],
        [6, 7]])
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from pytest_dcp._engine.plan.declared_parts import declared_boxes, declares_parts
from pytest_dcp._engine.plan.placement_boxes import LocalBox, local_boxes, whole_box
from pytest_dcp._torch_internals.dtensors import local_tensor, spec_of
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp._torch_internals.tensors import FakeTensor
from pytest_dcp.errors import PlanError

T = TypeVar("T")
PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Classes whose objects are their own memory, even in subclasses."""

DESCRIBING_HOOKS = ("__create_write_items__", "__create_chunk_list__", "__get_tensor_shard__")


def describes_its_parts(value: Any) -> bool:
    """Whether the value describes its own parts and is not a DTensor of plain tensors."""
    return hasattr(describer_of(value), "__create_write_items__")


def hooks_of(tensor: torch.Tensor) -> dict[str, Any]:
    """The methods that a program has set on this very object, and that say where its parts lie.

    Not the one that gives a part's memory: of a copy it would give the original's.
    """
    return {name: vars(tensor)[name] for name in DESCRIBING_HOOKS[:2] if name in vars(tensor)}


def with_hooks(tensor: torch.Tensor, hooks: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of the same memory, with these methods."""
    alias = tensor.detach()
    for name, hook in hooks.items():
        setattr(alias, name, hook)
    return alias


def describer_of(value: Any) -> Any:
    """The object that describes the value's parts: itself, or the local tensor of a DTensor."""
    return local_tensor(value) if isinstance(value, DTensor) else value


def own_write_items(fqn: str, value: torch.Tensor) -> list[WriteItem]:
    """The write items of a value that describes its own parts, with the dtype of its memory.

    The value may show another dtype than its data has. Raises PlanError, naming the fqn, if a
    method is missing or returns something else.
    """
    found = _ask_hook(fqn, value, "__create_write_items__", fqn, value)
    items = _check_list(fqn, "__create_write_items__", found, WriteItem)
    return [item if item.tensor_data is None else _of_memory(fqn, value, item) for item in items]


def own_chunks(fqn: str, value: torch.Tensor) -> list[ChunkStorageMetadata]:
    """The boxes of a value that describes its own parts; raises like `own_write_items`."""
    found = _ask_hook(fqn, value, "__create_chunk_list__")
    return _check_list(fqn, "__create_chunk_list__", found, ChunkStorageMetadata)


def own_shard(fqn: str, value: torch.Tensor, index: MetadataIndex) -> torch.Tensor:
    """The memory of a box of a value that describes its own parts; raises like `own_write_items`.

    The local tensor of a DTensor is its one box if it has no method for that, as in torch.
    """
    describer = describer_of(value)
    if describer is not value and not hasattr(describer, "__get_tensor_shard__"):
        whole: torch.Tensor = describer
        return whole
    found: object = _ask_hook(fqn, value, "__get_tensor_shard__", index)
    if not isinstance(found, torch.Tensor):
        raise PlanError(f"{fqn!r}: its __get_tensor_shard__ must give a tensor, it gave {found!r}")
    return found


def _ask_hook(fqn: str, value: torch.Tensor, hook: str, *args: object) -> Any:
    describer = describer_of(value)
    method = getattr(describer, hook, None)
    if not callable(method):
        raise PlanError(
            f"{fqn!r} is a {type(describer).__name__}, which has no {hook}: a class that "
            f"describes how it is saved needs {', '.join(DESCRIBING_HOOKS)}"
        )
    return method(*args)


def _check_list(fqn: str, hook: str, found: object, kind: type[T]) -> list[T]:
    items: list[Any] = list(found) if isinstance(found, list | tuple) else [found]
    if strange := [item for item in items if not isinstance(item, kind)]:
        raise PlanError(
            f"{fqn!r}: its {hook} must give a list of {kind.__name__}, it gave {strange[0]!r:.200}"
        )
    return items


def _of_memory(fqn: str, value: torch.Tensor, item: WriteItem) -> WriteItem:
    data: Any = item.tensor_data
    memory = own_shard(fqn, value, item.index)
    if memory.dtype == data.properties.dtype:
        return item
    properties = replace(data.properties, dtype=memory.dtype)
    return replace(item, tensor_data=replace(data, properties=properties))


def in_mesh(tensor: DTensor) -> bool:
    """Whether this rank is in the tensor's mesh and holds a part of it."""
    return tensor.device_mesh.get_coordinate() is not None


class HeldBoxes(NamedTuple):
    """The boxes that this rank holds of a DTensor; none outside its mesh."""

    size: torch.Size
    """Of the full tensor."""
    boxes: tuple[LocalBox, ...]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Offset and shape of each box, in the full tensor."""


class Layouts:
    """The boxes that this rank holds of DTensors; facts about a whole mesh are queried once."""

    def __init__(self) -> None:
        # By id, since a mesh's own hash is slow; the state dict keeps each mesh alive meanwhile.
        self._meshes: dict[int, tuple[tuple[int, ...], tuple[int, ...] | None]] = {}
        self._boxes_by_layout: dict[Any, HeldBoxes] = {}

    def boxes_of(self, fqn: str, value: DTensor) -> HeldBoxes:
        """The boxes of a DTensor.

        Raises PlanError, naming the fqn, for one with a pending reduction.
        """
        spec = spec_of(value)
        described: Any = spec.tensor_meta if type(value) is DTensor else value
        size = described.shape
        placements: tuple[Any, ...] = spec.placements
        # Mostly one placement, looked at inline: this runs once for each tensor.
        kind = type(placements[0]) if len(placements) == 1 else None
        if kind is Shard:
            key: Any = (id(spec.mesh), placements[0].dim, size)
        elif kind is Replicate:
            key = (id(spec.mesh), kind, size)
        else:
            key = (id(spec.mesh), *map(_kind_of, placements), size)
        held_boxes = self._boxes_by_layout.get(key)
        if held_boxes is None:
            boxes = self._find(fqn, value)
            sides = tuple((box.offset, box.shape) for box in boxes)
            held_boxes = self._boxes_by_layout[key] = HeldBoxes(size, boxes, sides)
        return held_boxes

    def _find(self, fqn: str, value: DTensor) -> tuple[LocalBox, ...]:
        mesh = value.device_mesh
        if id(mesh) not in self._meshes:
            at = mesh.get_coordinate()
            self._meshes[id(mesh)] = (tuple(mesh.shape), None if at is None else tuple(at))
        mesh_shape, coordinate = self._meshes[id(mesh)]
        if coordinate is None:
            return ()
        try:
            return local_boxes(tuple(value.shape), mesh_shape, coordinate, value.placements)
        except ValueError as error:
            raise PlanError(f"{fqn!r} cannot be saved or loaded: {error}") from error


def _kind_of(placement: Placement) -> Hashable:
    """A key that is equal for placements that hold the same part; torch's own hash takes 1 us."""
    kind: type = type(placement)
    if kind is Shard:
        dim: int = placement.dim  # type: ignore[attr-defined]  # a Shard's
        return dim
    return kind if kind is Replicate else placement


def boxes_of(fqn: str, value: torch.Tensor) -> tuple[LocalBox, ...]:
    """The boxes that this rank holds of one plain tensor or DTensor; see `Layouts`."""
    if isinstance(value, DTensor):
        return Layouts().boxes_of(fqn, value).boxes
    return (whole_box(value.shape),)


def local_shards(tensor: ShardedTensor) -> Iterator[tuple[LocalBox, torch.Tensor]]:
    """The boxes that this rank holds of a ShardedTensor, and their memory.

    A shard that is sharded again (tensor parallelism under FSDP1) is replaced by its innermost
    shards.
    """
    for shard in tensor.local_shards():
        origin = tuple(shard.metadata.shard_offsets)
        if not isinstance(shard.tensor, ShardedTensor):
            sizes = tuple(shard.metadata.shard_sizes)
            yield LocalBox(origin, sizes, (0,) * len(sizes)), shard.tensor
            continue
        for box, memory in local_shards(shard.tensor):
            offset = tuple(a + b for a, b in zip(origin, box.offset, strict=True))
            yield LocalBox(offset, box.shape, box.local_offset), memory


def shard_at(value: torch.Tensor, index: MetadataIndex) -> torch.Tensor:
    """The memory of the box at `index.offset` of a tensor that this rank holds a part of.

    Raises ValueError if the rank holds no box there.
    """
    describer = describer_of(value)
    alone = describer is not value and hasattr(describer, "__create_write_items__")
    if alone or hasattr(describer, "__get_tensor_shard__"):
        return own_shard(index.fqn, value, index)
    if isinstance(value, ShardedTensor):
        parts = [(box, part_of(memory, box)) for box, memory in local_shards(value)]
    else:
        memory = local_tensor(value) if isinstance(value, DTensor) else value
        find_boxes = declared_boxes if declares_parts(value) else boxes_of
        parts = [(box, part_of(memory, box)) for box in find_boxes(index.fqn, value)]
    if index.offset is None and len(parts) == 1:
        return parts[0][1]
    for box, memory in parts:
        if box.offset == tuple(index.offset or ()):
            return memory
    raise ValueError(f"{_not_found(value, index)} (this rank holds {[b.offset for b, _ in parts]})")


def _not_found(value: torch.Tensor, index: MetadataIndex) -> str:
    """Torch's own messages, which programs match."""
    if not isinstance(value, ShardedTensor | DTensor):
        return f"FQN: '{index.fqn}' is not a ShardedTensor, can't find by offset: '{index.offset}'"
    if index.offset is None:
        return f"Cannot lookup {index.fqn} since its a ShardedTensor and no offset was provided"
    return f"Could not find shard at '{index.offset}' for FQN: '{index.fqn}'"


def require_memory(fqn: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, after checking that its memory is as large as its shape and strides require.

    It is smaller if a storage was resized (as FSDP frees parameters) or the tensor is fake. Raises
    PlanError naming the fqn, since memory that is accessed through a pointer must exist.
    """
    count = tensor.numel()
    if not count:
        return tensor
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((n - 1) * step for n, step in steps)
    last = tensor.storage_offset() + count
    have = tensor.untyped_storage().nbytes()
    fake = type(tensor) not in PLAIN and isinstance(tensor, FakeTensor)
    if last * tensor.itemsize > have or fake or not tensor.data_ptr():
        raise PlanError(
            f"{fqn!r} has no memory for its values: shape {tuple(tensor.shape)} of {tensor.dtype} "
            f"needs {last * tensor.itemsize} bytes, its storage has {have}"
        )
    return tensor


def part_of(memory: torch.Tensor, box: LocalBox) -> torch.Tensor:
    """The box's own part of the local tensor, a view."""
    if box.whole and tuple(memory.shape) == box.shape:
        return memory
    for dim, (start, length) in enumerate(zip(box.local_offset, box.shape, strict=True)):
        memory = memory.narrow(dim, start, length)
    return memory
