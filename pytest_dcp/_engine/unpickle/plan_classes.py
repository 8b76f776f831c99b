"""Plans in a `.metadata` file: torch's plan classes, which some frameworks store with a checkpoint.

Enters: fields in any state, as a pickle sets them. Leaves: torch's own objects. The engine does not
use them: `check_further` only makes sure that walking them does no harm.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from pytest_dcp._engine.unpickle.machine import Callee, PickleMachine, brief
from pytest_dcp._engine.unpickle.plain_values import brief_all, check_plain
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo, _StoragePrefix
from pytest_dcp._torch_internals.sharded_tensors import TensorProperties as LegacyProperties
from pytest_dcp.errors import CheckpointCorruptError

MAX_NAME = 256
"""Characters of a field's name."""

PLAN_CLASSES: tuple[type, ...] = (
    *(SavePlan, LoadPlan, WriteItem, ReadItem, TensorWriteData, BytesIOWriteData, _StoragePrefix),
)
_KINDS: tuple[type[Enum], ...] = (WriteItemType, LoadItemType)
_RECORDS = frozenset(
    {
        *(*PLAN_CLASSES, StorageMeta, _StorageInfo, MetadataIndex, ChunkStorageMetadata),
        *(TensorProperties, LegacyProperties, TensorStorageMetadata, BytesStorageMetadata),
    }
)
_ATOMS = frozenset(
    {
        *(*_KINDS, UnreadObject, torch.memory_format),
        *(pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path())),
    }
)
"""Allowed in a further field of Metadata besides plain values and the records above."""
UNREAD = frozenset({UnreadObject})
"""Allowed in planner_data besides plain values."""


def field_setter(cls: type) -> Callable[[Any, object], None]:
    """A function that sets the fields of an instance from the pickle's dict.

    Fields that this version of torch does not have are set too: unused, they do no harm.
    """
    assign = object.__setattr__

    def build(target: Any, state: object) -> None:
        if type(state) is not dict:
            raise _corrupt(cls.__name__, "a dict of its fields", state)
        for name, value in state.items():
            if type(name) is not str or len(name) > MAX_NAME or not name.isidentifier():
                raise _corrupt(cls.__name__, "names of fields", name)
            if name.startswith("__"):
                raise _corrupt(cls.__name__, "fields, not what Python itself looks at", name)
            assign(target, name, value)

    return build


def enum_maker(cls: type[Any]) -> Callable[[PickleMachine, tuple[Any, ...]], object]:
    """A function that makes a member of an enum whose values are ints."""
    values = {member.value for member in cls}

    def call(_: PickleMachine, args: tuple[Any, ...]) -> object:
        if len(args) != 1 or type(args[0]) is not int or args[0] not in values:
            value_range = f"{min(values)}..{max(values)}"
            raise CheckpointCorruptError(
                f"expected {cls.__name__}({value_range}), got {brief_all(args)}"
            )
        return cls(args[0])

    return call


def _prefix(_: PickleMachine, args: tuple[Any, ...]) -> _StoragePrefix:
    if len(args) != 1 or type(args[0]) is not str:
        raise CheckpointCorruptError(f"expected a prefix of file names, got {brief_all(args)}")
    return _StoragePrefix(args[0])


def plan_globals() -> Iterator[tuple[tuple[str, str], object]]:
    """The plan classes by module and name."""
    for cls in PLAN_CLASSES:
        name = f"{cls.__module__}.{cls.__name__}"
        call = _prefix if cls is _StoragePrefix else None
        yield (cls.__module__, cls.__name__), Callee(name, call, partial(object.__new__, cls))
    for kind in _KINDS:
        yield (kind.__module__, kind.__name__), Callee(kind.__name__, enum_maker(kind))


def plan_builders() -> dict[type, Callable[[Any, object], None]]:
    """The functions that set the fields of each plan class."""
    return {cls: field_setter(cls) for cls in PLAN_CLASSES}


def check_further(value: object, name: str) -> object:
    """The value of a further field, or an `UnreadObject` if walking it could do harm."""
    try:
        check_plain(value, f"Metadata.{name}", _ATOMS, records=_RECORDS)
    except CheckpointCorruptError as error:
        return UnreadObject(f"Metadata.{name} ({error.reason[:200]})")
    return value


def _corrupt(where: str, expected: str, value: object) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{where}: expected {expected}, got {brief(value)}")
