"""A part of a stored wrapper subclass -> into a part of the target, where the two are cut unlike.

Only a wrapper's own class knows which elements of its inner tensors belong to a part of it, so its
slice (`narrow`) is asked, as torch's engine does. The stored wrapper is rebuilt as an object of the
target's class around the entry's tensors; no code of the checkpoint runs. A quantised class refuses
parts that do not end where its blocks do: the error names the key, the block and the way out.

The target's part must be a view, or nothing would be loaded. An inner tensor that its class copies
when it slices (a table of quantisation, say) must be equal in the checkpoint and here.

Here each row of a 4 x 2 tensor has a scale, so its rows can be cut:

>>> class Rows(torch.Tensor):
...     @staticmethod
...     def __new__(cls, values, scale):
...         return torch.Tensor._make_wrapper_subclass(cls, values.size(), dtype=torch.float32)
...     def __init__(self, values, scale):
...         self.values, self.scale = values, scale
...     def __tensor_flatten__(self):
...         return ["values", "scale"], None
...     @classmethod
...     def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
...         assert func is torch.ops.aten.slice.Tensor and args[1] == 0
...         return cls(*(func(inner, *args[1:]) for inner in (args[0].values, args[0].scale)))
>>> whole = Rows(torch.arange(8).reshape(4, 2), torch.arange(4.0))
>>> part = cut("w", whole, WrapperBox((1, 0), (2, 2)))
>>> part.values.tolist(), part.scale.tolist()
([[2, 3], [4, 5]], [1.0, 2.0])
>>> cut("w", whole, WrapperBox((0, 1), (4, 1)))
Traceback (most recent call last):
    ...
pytest_dcp.errors.CheckpointMismatchError: 'w' is a Rows of size (4, 2), of which its class cannot
cut the part of size (4, 1) at (0, 1) (AssertionError()): load it in the layout in which it was
saved
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_dcp._engine.format.opaque_values import (
    Storage,
    describe_target,
    misfit,
    open_wrapper,
    storage_tensor,
)
from pytest_dcp._engine.format.wrapper_attributes import require_same_attributes
from pytest_dcp._engine.plan.opaque import inner_tensors, is_wrapper
from pytest_dcp._engine.plan.placement_boxes import LocalBox
from pytest_dcp._engine.unpickle import TensorPickle
from pytest_dcp._engine.unpickle.opaque_tensors import OpaqueWrapper
from pytest_dcp._torch_internals.tensors import identity_of_storage
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Where to, and from where."""
BLOCK_SIZES = ("block_size", "block", "group_size")
"""Attributes by which classes say how many elements share a scale."""


@dataclass(frozen=True, slots=True)
class WrapperBox:
    """A box of a wrapper, in elements of the wrapper."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a wrapper of this shape."""
        return self.shape == tuple(shape) and not any(self.offset)


def cut(fqn: str, wrapper: torch.Tensor, part: WrapperBox) -> torch.Tensor:
    """This part of the wrapper, by its class's own slice.

    Raises CheckpointMismatchError, naming the key, if the class refuses.
    """
    piece = wrapper
    try:
        for dim, (start, length) in enumerate(zip(part.offset, part.shape, strict=True)):
            if (start, length) != (0, piece.shape[dim]):
                piece = piece.narrow(dim, start, length)
    except Exception as error:
        # Its class may refuse as it likes.
        raise _uncuttable(fqn, wrapper, part, error) from error
    return piece


def copy_part(
    fqn: str,
    target: torch.Tensor,
    into: WrapperBox,
    stored: OpaqueWrapper,
    entry: bytes | memoryview,
    stored_box: WrapperBox,
) -> Callable[[], None]:
    """A function that copies a part of the entry's wrapper to a part of the target.

    Raises CheckpointMismatchError, naming the key, unless all of it fits; CheckpointCorruptError
    for a damaged entry.
    """
    _, storage = open_wrapper(entry)
    with torch.no_grad():
        whole = _rebuild(fqn, target, stored, storage)
        source, sink = cut(fqn, whole, stored_box), cut(fqn, target, into)
        require_same_attributes(fqn, sink, vars(source), dict(inner_tensors(source)))
        copies = _copies(fqn, target, sink, source)

    def copy() -> None:
        with torch.no_grad():
            for to, value in copies:
                to.copy_(value)

    return copy


def copy_box(
    fqn: str,
    target: torch.Tensor,
    boxes: Sequence[LocalBox],
    size: Sequence[int],
    entry: bytes | memoryview,
) -> Callable[[], None]:
    """A function that copies this rank's box of a wrapper that was saved whole to the target.

    boxes: of the target in the full tensor; none outside its mesh. size: of the full tensor. Raises
    like `copy_part`.
    """
    stored, _ = open_wrapper(entry)
    if not isinstance(stored, OpaqueWrapper) or stored.shape != tuple(size):
        kind = stored.kind if isinstance(stored, OpaqueWrapper) else "tensor without inner ones"
        raise misfit(fqn, f"a {kind}", f"a DTensor of {tuple(size)} and {describe_target(target)}")
    copies = [
        copy_part(
            fqn, target, WrapperBox(box.local_offset, box.shape), stored, entry,
            WrapperBox(box.offset, box.shape),
        )
        for box in boxes
    ]  # fmt: skip

    def copy() -> None:
        for one in copies:
            one()

    return copy


def _rebuild(fqn: str, target: Any, stored: OpaqueWrapper, storage: Storage) -> torch.Tensor:
    """The stored wrapper, of its own size, as an object of the target's class."""
    names, context = target.__tensor_flatten__() if is_wrapper(target) else ((), None)
    if not names or any(name not in stored.inner() for name in names):
        there = f"a {stored.kind} of size {stored.shape}, a wrapper of {', '.join(stored.inner())},"
        raise misfit(fqn, there, describe_target(target))
    inner = {}
    for name in names:
        part, here = stored.state[name], getattr(target, name)
        if isinstance(part, OpaqueWrapper):
            inner[name] = _rebuild(f"{fqn}.{name}", here, part, storage)
        elif isinstance(part, TensorPickle) and not is_wrapper(here) and part.dtype == here.dtype:
            inner[name] = _bounded_tensor(part, storage)
        else:
            raise misfit(f"{fqn}.{name}", f"a {type(part).__name__}", describe_target(here))
    size = torch.Size(stored.shape)
    stride = torch.empty(size, device="meta").stride()
    try:
        rebuilt: torch.Tensor = type(target).__tensor_unflatten__(
            inner, _resize_context(context, tuple(target.shape), size), size, stride
        )
    except Exception as error:
        raise _uncuttable(fqn, target, WrapperBox((0,) * len(size), size), error) from error
    if rebuilt.shape != size:
        raise misfit(
            fqn, f"of size {tuple(size)}", f"a class that made one of {tuple(rebuilt.shape)}"
        )
    require_same_attributes(fqn, rebuilt, stored.state, names)
    return rebuilt


def _bounded_tensor(stored: TensorPickle, storage: Storage) -> torch.Tensor:
    """The tensor; refused if it has more elements than its storage, since a class may copy it."""
    if math.prod(stored.shape) * stored.dtype.itemsize > stored.storage_nbytes:
        raise CheckpointCorruptError(
            f"expected a storage with all elements of {stored.shape}, got {stored.storage_nbytes} "
            "bytes"
        )
    return storage_tensor(stored, storage)


def _resize_context(context: Any, here: tuple[int, ...], size: torch.Size) -> Any:
    """The context of a wrapper's class, with the stored size in place of the target's."""
    if type(context) in (tuple, list, torch.Size):
        if tuple(context) == here:
            return type(context)(size)
        if type(context) is not torch.Size:
            return type(context)(_resize_context(one, here, size) for one in context)
    return context


def _copies(fqn: str, whole: Any, sink: Any, source: Any) -> Copies:
    """The inner tensors of the source, and those of the sink, which are views of the whole's."""
    copies: Copies = []
    for name, to in inner_tensors(sink):
        value, original = getattr(source, name), getattr(whole, name)
        key = f"{fqn}.{name}"
        if is_wrapper(to):
            copies += _copies(key, original, to, value)
        elif to.shape != value.shape or to.dtype != value.dtype:
            raise misfit(
                key, f"{value.dtype} of size {tuple(value.shape)} in this part", describe_target(to)
            )
        elif to is original or _share_memory(to, original):
            copies.append((to, value))
        elif not torch.equal(to, value.to(to.device)):
            raise misfit(
                key,
                "a tensor of other values",
                "one that its class copies when it cuts, so that it cannot be loaded in parts",
            )
    return copies


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return identity_of_storage(one.untyped_storage()) == identity_of_storage(
        other.untyped_storage()
    )


def _uncuttable(
    fqn: str, wrapper: Any, box: WrapperBox, error: Exception
) -> CheckpointMismatchError:
    sizes = [getattr(wrapper, name, None) for name in BLOCK_SIZES]
    block = next((size for size in sizes if type(size) is int), None)
    elsewhere = (
        ""
        if block is None
        else (
            f", or in one in which each part begins and ends at a multiple of {block} elements, "
            "which share a scale"
        )
    )
    return CheckpointMismatchError(
        f"{fqn!r} is a {type(wrapper).__name__} of size {tuple(wrapper.shape)}, of which its class "
        f"cannot cut the part of size {tuple(box.shape)} at {tuple(box.offset)} ({error!r}): "
        f"load it in the layout in which it was saved{elsewhere}",
        mismatched=(fqn,),
    )
