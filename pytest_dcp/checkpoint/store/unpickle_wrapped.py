"""Reads the pickle of a tensor of a subclass, without making one. Pure (no I/O).

What enters: the `data.pkl` of an entry in which torch's writer has put a subclass of Tensor. What
leaves: the description of its memory, where it has some, or of the tensors within it, where it is a
wrapper, with its plain attributes; its class is named and never looked up. Objects that a wrapper
carries are not read: a load fills a wrapper that is there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pytest_dcp.checkpoint.store.unpickle import TensorPickle, tensor_vocabulary
from pytest_dcp.checkpoint.store.unpickle_machine import (
    Callee,
    Machine,
    UnknownGlobalError,
    brief,
)
from pytest_dcp.checkpoint.store.unpickle_opcodes import run
from pytest_dcp.checkpoint.store.unpickle_unread import UnreadObject, may_stay_unread
from pytest_dcp.checkpoint.store.unpickle_values import PLAIN
from pytest_dcp.errors import CheckpointCorruptError

MAX_DEPTH = 8
"""Wrappers within wrappers."""


@dataclass(frozen=True, slots=True)
class WrapperPickle:
    """What a pickle says of a wrapper."""

    class_name: str
    dtype: torch.dtype
    """That the wrapper shows; its inner tensors have their own."""
    shape: tuple[int, ...]
    inner: Mapping[str, TensorPickle | WrapperPickle]
    """By the names of the attributes."""
    attributes: Mapping[str, Any]
    """The others."""
    depth: int
    """Of wrappers within, this one counted."""


def read_subclass_pickle(data: bytes | memoryview) -> TensorPickle | WrapperPickle:
    """The description of the one tensor, of a subclass or not, that the pickle holds.

    Raises:
        UnknownGlobalError: it holds something else.
        CheckpointCorruptError: the pickle is malformed, or a tensor reaches beyond its storage.
    """
    found = run(data, _SUBCLASSES)
    if type(found) not in (TensorPickle, WrapperPickle):
        raise UnknownGlobalError(f"expected a pickle of one tensor, got {brief(found)}")
    tensor: TensorPickle | WrapperPickle = found
    return tensor


@dataclass(frozen=True, slots=True)
class _Bare:
    """A wrapper as its class is told to make it, before its state is given to it."""

    class_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _rebuild_from_type(machine: Machine, args: tuple[Any, ...]) -> TensorPickle | WrapperPickle:
    """torch._tensor._rebuild_from_type_v2: a function makes it, of this class, with this state."""
    if len(args) != 4 or type(args[0]) is not Callee or type(args[2]) is not tuple:
        raise UnknownGlobalError("expected a tensor of a subclass, got something else")
    make, _, facts, state = args
    if make.call is None:
        raise UnknownGlobalError(f"expected a function that makes a tensor, got {brief(make)}")
    made = make.call(machine, facts)
    if type(made) is TensorPickle:
        return made
    if type(made) is not _Bare:
        raise UnknownGlobalError(f"expected a tensor of a subclass, got {brief(made)}")
    return _with_inner(made, state)


def _with_inner(bare: _Bare, state: object) -> WrapperPickle:
    fields = state[0] if type(state) is tuple and state else state
    if type(fields) is not dict:
        raise UnknownGlobalError(f"expected a wrapper's fields, got {brief(fields)}")
    kinds = (TensorPickle, WrapperPickle)
    inner = {name: value for name, value in fields.items() if type(value) in kinds}
    others = {name: value for name, value in fields.items() if name not in inner}
    if not inner or not all(type(name) is str for name in fields):
        raise UnknownGlobalError(f"expected a wrapper of tensors, got none in {bare.class_name}")
    depths = [value.depth for value in inner.values() if type(value) is WrapperPickle]
    depth = 1 + max(depths, default=0)
    if depth > MAX_DEPTH:
        raise CheckpointCorruptError(f"expected at most {MAX_DEPTH} wrappers within each other")
    return WrapperPickle(bare.class_name, bare.dtype, bare.shape, inner, others, depth)


def _rebuild_wrapper(_: Machine, args: tuple[Any, ...]) -> _Bare:
    """torch._utils._rebuild_wrapper_subclass: class, dtype, size, stride and further facts."""
    if len(args) < 3 or type(args[0]) is not UnreadObject or type(args[1]) is not torch.dtype:
        raise UnknownGlobalError("expected a wrapper's class, dtype and size, got something else")
    size = args[2]
    if not isinstance(size, tuple) or not all(type(side) is int and side >= 0 for side in size):
        raise CheckpointCorruptError(f"expected a wrapper's size, got {brief(size)}")
    return _Bare(args[0].class_name, args[1], tuple(size))


def _layout(machine: Machine, args: tuple[Any, ...]) -> UnreadObject:
    return machine.keep_aside("torch.layout")


def _is_class(module: str, name: str) -> bool:
    """Whether a name may be that of the subclass, or of an object that a wrapper carries."""
    return may_stay_unread(module, name) or module.startswith("torch.testing._internal.")


_TENSORS = tensor_vocabulary()
_SUBCLASSES = replace(
    _TENSORS,
    globals={
        **PLAIN.globals,
        **_TENSORS.globals,
        ("torch._tensor", "_rebuild_from_type_v2"): Callee(
            "torch._tensor._rebuild_from_type_v2", _rebuild_from_type
        ),
        ("torch._utils", "_rebuild_wrapper_subclass"): Callee(
            "torch._utils._rebuild_wrapper_subclass", _rebuild_wrapper
        ),
        ("torch.serialization", "_get_layout"): Callee("_get_layout", _layout),
    },
    keeps_unread=_is_class,
)
