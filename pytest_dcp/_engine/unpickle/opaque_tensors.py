"""Reads the pickle of a tensor of any class or dtype into descriptions, without making its objects.

Enters: the `data.pkl` of an entry that `torch.save` made of one tensor: a subclass with its own
memory, a wrapper of other tensors, or a quantised tensor. Leaves: an `OpaquePickle`. Neither the
classes that the pickle names nor the objects that a wrapper carries are made: the tensor to load
into already has them. Pure (no I/O).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pytest_dcp._engine.unpickle.interpreter import run
from pytest_dcp._engine.unpickle.machine import (
    Callee,
    PickleMachine,
    UnknownGlobalError,
    Vocabulary,
    brief,
)
from pytest_dcp._engine.unpickle.plain_values import PLAIN
from pytest_dcp._engine.unpickle.tensor_pickles import (
    StorageClass,
    TensorPickle,
    load_storage,
    rebuild_tensor,
    tensor_vocabulary,
)
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject, may_stay_unread
from pytest_dcp.errors import CheckpointCorruptError

QUANTISED = {
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


@dataclass(frozen=True, slots=True, eq=False)
class OpaqueWrapper:
    """A wrapper subclass."""

    kind: str
    """Its class, by module and name."""
    dtype: torch.dtype
    """The wrapper's own; its inner tensors have theirs."""
    shape: tuple[int, ...]
    state: Mapping[str, Any]
    """Its attributes: TensorPickle, OpaqueWrapper, QuantisedPickle, plain values, UnreadObject."""

    def inner(self) -> dict[str, OpaquePickle]:
        """The tensors among its attributes."""
        return {name: one for name, one in self.state.items() if isinstance(one, OpaquePickle)}


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedPickle:
    """A tensor of a quantised dtype."""

    data: TensorPickle
    """Its integers; their dtype is the quantised one."""
    scheme: torch.qscheme
    parameters: tuple[Any, ...]
    """Scale and zero point; or TensorPickles of scales and zero points, and the axis."""


OpaquePickle = OpaqueWrapper | QuantisedPickle | TensorPickle


def read_opaque_pickle(data: bytes | memoryview) -> OpaquePickle:
    """The description of the one tensor that a pickle holds.

    Raises:
        UnknownGlobalError: it holds something else.
        CheckpointCorruptError: the pickle is malformed or made to exhaust its reader.
    """
    found = run(data, _VOCABULARY)
    if not isinstance(found, OpaquePickle):
        raise UnknownGlobalError(f"expected a pickle of one tensor, got {brief(found)}")
    return found


def _is_class(module: str, name: str) -> bool:
    """Whether this may be the name of a wrapper's class, or of an object that a wrapper carries."""
    return may_stay_unread(module, name) or module.startswith(_WRAPPERS_OF_TORCH)


_WRAPPERS_OF_TORCH = ("torch.testing._internal.", "torch.sparse.")
_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_QUANTISED = "torch._utils._rebuild_qtensor"
_PARAMETER = "torch._utils._rebuild_parameter"


@dataclass(frozen=True, slots=True)
class _Outside:
    """The result of `_rebuild_wrapper_subclass`: a wrapper without inner tensors yet."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _wrapper(_: PickleMachine, args: tuple[Any, ...]) -> _Outside:
    kind, dtype, shape = args[:3] if len(args) >= 3 else (None,) * 3
    if type(kind) is not UnreadObject or type(dtype) is not torch.dtype:
        raise CheckpointCorruptError(f"expected a wrapper's class, dtype and size, got {len(args)}")
    if not isinstance(shape, tuple):
        raise CheckpointCorruptError(f"expected a wrapper's size, got {brief(shape)}")
    return _Outside(kind.class_name, dtype, tuple(shape))


def _layout(machine: PickleMachine, args: tuple[Any, ...]) -> UnreadObject:
    return machine.keep_aside("torch.layout")


def _from_type(machine: PickleMachine, args: tuple[Any, ...]) -> object:
    """`_rebuild_from_type_v2(function, class, arguments, state)`."""
    if len(args) != 4 or type(args[0]) is not Callee or type(args[2]) is not tuple:
        raise CheckpointCorruptError("expected a function, a class, its arguments and a state")
    make, _, inner, state = args
    if isinstance(state, tuple) and len(state) == 2:  # with slots
        state = {**_fields(state[0]), **_fields(state[1])}
    if make.call is None:
        raise UnknownGlobalError(f"expected a function that makes a tensor, got {make.name}")
    tensor = make.call(machine, inner)
    if type(tensor) is _Outside:
        return OpaqueWrapper(tensor.kind, tensor.dtype, tensor.shape, _fields(state))
    return tensor  # A subclass with memory of its own, or a parameter.


def _fields(state: object) -> dict[str, Any]:
    if state is None:
        return {}
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise CheckpointCorruptError(f"expected a tensor's attributes, got {brief(state)}")
    return state


def _rebuild_quantised(_: PickleMachine, args: tuple[Any, ...]) -> QuantisedPickle:
    """`_rebuild_qtensor(storage, offset, size, stride, parameters, requires_grad, hooks)`."""
    if len(args) != 7 or type(args[4]) is not tuple or not args[4]:
        raise CheckpointCorruptError(f"expected 7 facts of a quantised tensor, got {len(args)}")
    scheme, *parameters = args[4]
    if not isinstance(scheme, torch.qscheme):
        raise CheckpointCorruptError(f"expected a quantisation scheme, got {brief(scheme)}")
    data = rebuild_tensor((*args[:4], *args[5:]))
    return QuantisedPickle(data, scheme, tuple(parameters))


def _parameter(_: PickleMachine, args: tuple[Any, ...]) -> object:
    if not args or not isinstance(args[0], OpaquePickle):
        raise UnknownGlobalError("expected a parameter over a tensor, got one over something else")
    return args[0]


def _known_globals() -> Iterator[tuple[tuple[str, str], object]]:
    yield from PLAIN.globals.items()
    yield from tensor_vocabulary().globals.items()
    for call, path in (
        (_wrapper, _WRAPPER),
        (_from_type, _FROM_TYPE),
        (_rebuild_quantised, _QUANTISED),
        (_parameter, _PARAMETER),
        (_layout, "torch.serialization._get_layout"),
    ):
        module, _, name = path.rpartition(".")
        yield (module, name), Callee(path, call)
    for name, value in vars(torch).items():
        if isinstance(value, torch.qscheme):
            yield ("torch", name), value
    for storage, dtype in QUANTISED.items():
        for module in ("torch", "torch.storage"):
            yield (module, storage), StorageClass(dtype)


_VOCABULARY = Vocabulary(
    globals=dict(_known_globals()), build={}, persistent=load_storage, keeps_unread=_is_class
)
