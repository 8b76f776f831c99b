"""The classes of a `.metadata` file: how a pickle may make them, and checks of their fields.

Enters: fields in any state, as a pickle sets them. Leaves: torch's own objects.

While the pickle runs, a field may hold any value; only hashed objects (MetadataIndex) and objects
that set their own state (TensorProperties) are inspected. `check_metadata` checks everything else
once the pickle has ended and no object can change any more; it knows the fqn, so that errors can
name it.

The fields: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.0 to 2.13. Further
fields, of a later torch or a framework, are kept on Metadata itself, and have no effect elsewhere.
An object of an unknown class (`UnreadObject`) stops a load only where the load needs it.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.plan.index import further_fields
from pytest_dcp._engine.unpickle.machine import Callee, PickleMachine, Vocabulary, brief
from pytest_dcp._engine.unpickle.metadata_records import chunks, entries, tensors
from pytest_dcp._engine.unpickle.plain_values import (
    MAX_DIMS,
    PLAIN,
    brief_all,
    check_plain,
    size_of,
)
from pytest_dcp._engine.unpickle.plan_classes import (
    UNREAD,
    check_further,
    enum_maker,
    field_setter,
    plan_builders,
    plan_globals,
)
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject, may_stay_unread
from pytest_dcp._torch_internals.checkpoint_classes import _MEM_FORMAT_ENCODING, _StorageInfo
from pytest_dcp._torch_internals.sharded_tensors import MEM_FORMAT_ENCODING as LegacyEncoding
from pytest_dcp._torch_internals.sharded_tensors import TensorProperties as LegacyProperties
from pytest_dcp.errors import CheckpointCorruptError

MAX_DESCRIPTORS = 64
"""Transforms of one entry; torch writes one to three."""
_INT64_BOUND = 1 << 63
_PATH_COST = 64
_PATH_CHARACTER_COST = 4
"""A path keeps each of its parts as a separate string, some 50 bytes for two characters."""
_TEXT_OR_NONE = (str, type(None))

_METADATA = "torch.distributed.checkpoint.metadata"
_LEGACY = "torch.distributed._shard.sharded_tensor.metadata"
_FORMATS = {
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_RECORD_CLASSES: tuple[type, ...] = (
    *(Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata),
    *(MetadataIndex, StorageMeta, _StorageInfo),
)


# ---- while the pickle runs


def _build_index(index: Any, state: object) -> None:
    """Sets the fields of a MetadataIndex, once: it is hashed next, and must not change after
    that."""
    if getattr(index, "fqn", None) is not None:
        raise CheckpointCorruptError("expected each MetadataIndex to be built once, got it twice")
    _SET_INDEX(index, state)
    fqn = getattr(index, "fqn", None)
    if type(fqn) is not str:
        raise _corrupt("MetadataIndex.fqn", "a str", fqn)
    if index.offset is not None:
        _check_size(index.offset, f"MetadataIndex({brief(fqn)}).offset")
    if index.index is not None:
        _check_count(index.index, f"MetadataIndex({brief(fqn)}).index")


def _build_properties(properties: Any, state: object) -> None:
    """The effect of TensorProperties.__setstate__, of either class."""
    if type(state) is not tuple or len(state) != 5:
        raise _corrupt("TensorProperties", "a state of five fields", state)
    encoding = state[3]
    if type(encoding) not in (_MEM_FORMAT_ENCODING, LegacyEncoding):
        raise _corrupt(
            "TensorProperties.memory_format", "a member of MEM_FORMAT_ENCODING", encoding
        )
    properties.memory_format = _FORMATS[encoding.name]
    properties.dtype, properties.layout, properties.requires_grad = state[:3]
    properties.pin_memory = state[4]


def _layout(_: PickleMachine, args: tuple[Any, ...]) -> torch.layout:
    if len(args) != 1 or type(args[0]) is not str or args[0] not in _LAYOUTS:
        raise CheckpointCorruptError(f"expected a layout of torch, got {brief_all(args)}")
    return _LAYOUTS[args[0]]


def _path_maker(cls: type[pathlib.PurePath]) -> Callable[[PickleMachine, tuple[Any, ...]], object]:
    def call(machine: PickleMachine, args: tuple[Any, ...]) -> pathlib.PurePath:
        machine.charge(_PATH_COST + len(args))
        for part in args:
            if type(part) is not str:
                raise _corrupt("a path", "parts of str", part)
            machine.charge(_PATH_CHARACTER_COST * len(part))
        return cls(*args)

    return call


def _path_classes() -> Iterator[tuple[str, type[pathlib.PurePath]]]:
    """The class for each kind of path; paths of another system become pure ones, which cannot open
    files."""
    posix = os.name == "posix"
    yield "PurePosixPath", pathlib.PurePosixPath
    yield "PureWindowsPath", pathlib.PureWindowsPath
    yield "PosixPath", pathlib.PosixPath if posix else pathlib.PurePosixPath
    yield "WindowsPath", pathlib.PureWindowsPath if posix else pathlib.WindowsPath


def _globals() -> Iterator[tuple[tuple[str, str], object]]:
    yield from PLAIN.globals.items()
    yield from plan_globals()
    for cls in (*_RECORD_CLASSES, TensorProperties, LegacyProperties):
        new = partial(object.__new__, cls)
        yield (cls.__module__, cls.__name__), Callee(f"{cls.__module__}.{cls.__name__}", new=new)
    for encoding in (_MEM_FORMAT_ENCODING, LegacyEncoding):
        callee = Callee(encoding.__name__, enum_maker(encoding))
        yield (encoding.__module__, encoding.__name__), callee
    yield ("torch", "Size"), Callee("torch.Size", size_of)
    yield ("torch.serialization", "_get_layout"), Callee("_get_layout", _layout)
    for name, layout in _LAYOUTS.items():
        yield ("torch", name.removeprefix("torch.")), layout
    for name, path in _path_classes():
        for module in ("pathlib", "pathlib._local"):  # the latter: Python 3.13
            yield (module, name), Callee(f"pathlib.{name}", _path_maker(path))


def _with_records() -> Iterator[tuple[tuple[str, str], object]]:
    for key, value in STEPWISE.globals.items():
        records = _RECORDS.get(key)
        yield key, value if records is None else replace(value, records=records)  # type: ignore[type-var]  # a Callee


_RECORDS = {
    (_METADATA, TensorStorageMetadata.__name__): tensors,
    (_METADATA, ChunkStorageMetadata.__name__): chunks,
    (_METADATA, MetadataIndex.__name__): entries,
}
_SET_INDEX = field_setter(MetadataIndex)
STEPWISE = Vocabulary(
    globals=dict(_globals()),
    build={cls: field_setter(cls) for cls in _RECORD_CLASSES}
    | plan_builders()
    | {
        MetadataIndex: _build_index,
        TensorProperties: _build_properties,
        LegacyProperties: _build_properties,
    },
    keys=frozenset({MetadataIndex}),
    keeps_unread=may_stay_unread,
)
"""Reads a `.metadata` pickle opcode by opcode."""
METADATA = replace(STEPWISE, globals=dict(_with_records()))
"""Like STEPWISE, but reads whole records where it can; see `metadata_records`."""


# ---- once the pickle has ended


def check_metadata(root: object) -> Metadata:
    """`root`, after checking that it is a Metadata whose fields have the types that readers rely
    on. Pure (no I/O).

    Inspects each object a bounded number of times, even if it is referred to often.
    """
    if type(root) is not Metadata:
        raise _corrupt("the file", "a pickled Metadata", root)
    entries = getattr(root, "state_dict_metadata", None)
    if type(entries) is not dict:
        raise _corrupt("Metadata.state_dict_metadata", "a dict of str", entries)
    _leave_out_unread(root)
    seen: set[int] = set()
    for fqn, entry in root.state_dict_metadata.items():
        where = f"state_dict_metadata[{brief(fqn)}]"
        if type(fqn) is not str:
            raise _corrupt(where, "a str as its key", fqn)
        _check_entry(entry, where, seen)
    _check_storage_data(root.storage_data)
    _check_storage_meta(root.storage_meta)
    if type(root.version) not in _TEXT_OR_NONE:
        raise _corrupt("Metadata.version", "a str or None", root.version)
    check_plain(root.planner_data, "Metadata.planner_data", UNREAD)
    for name, value in further_fields(root).items():
        setattr(root, name, check_further(value, name))
    return root


def _leave_out_unread(root: Metadata) -> None:
    """Remove entries of the metadata whose class is not known.

    A key with such a description counts as absent; a key with such a place cannot be loaded.
    """
    entries = root.state_dict_metadata
    root.state_dict_metadata = _without_unread(entries)
    if type(root.storage_data) is dict:
        root.storage_data = _without_unread(root.storage_data)
    for name in ("storage_data", "storage_meta", "version"):
        if type(getattr(root, name)) is UnreadObject:
            setattr(root, name, None)


def _without_unread(table: dict[Any, Any]) -> dict[Any, Any]:
    if UnreadObject not in set(map(type, table.values())):
        return table
    return {key: value for key, value in table.items() if type(value) is not UnreadObject}


def _check_entry(entry: object, where: str, seen: set[int]) -> None:
    if type(entry) is BytesStorageMetadata:
        return
    if type(entry) is not TensorStorageMetadata:
        raise _corrupt(where, "TensorStorageMetadata or BytesStorageMetadata", entry)
    try:
        properties, size, chunks = entry.properties, entry.size, entry.chunks
    except AttributeError as error:
        raise _corrupt(where, f"the field {error.name}", None) from None
    _check_properties(properties, where)
    _check_size(size, f"{where}.size")
    if type(chunks) is not list:
        raise _corrupt(f"{where}.chunks", "a list of ChunkStorageMetadata", chunks)
    if id(chunks) not in seen:
        seen.add(id(chunks))
        _check_chunks(chunks, where)


def _check_chunks(chunks: list[Any], where: str) -> None:
    for position, chunk in enumerate(chunks):
        if type(chunk) is not ChunkStorageMetadata:
            raise _corrupt(f"{where}.chunks[{position}]", "a ChunkStorageMetadata", chunk)
        try:
            offsets, sizes = chunk.offsets, chunk.sizes
        except AttributeError as error:
            missing = f"the field {error.name}"
            raise _corrupt(f"{where}.chunks[{position}]", missing, None) from None
        if type(offsets) is not torch.Size or min(offsets, default=0) < 0:
            _repair_size(chunk, "offsets", f"{where}.chunks[{position}]")
        if type(sizes) is not torch.Size or min(sizes, default=0) < 0:
            _repair_size(chunk, "sizes", f"{where}.chunks[{position}]")


def _repair_size(chunk: ChunkStorageMetadata, field: str, where: str) -> None:
    """Make a torch.Size of a field that is a plain tuple of numbers.

    torch's engine takes such chunks from a tensor that describes its own parts (Megatron-FSDP's),
    and stores them as they are.
    """
    found: Any = getattr(chunk, field)
    if type(found) is tuple and len(found) <= MAX_DIMS:
        for number in found:
            _check_count(number, f"{where}.{field}")
        object.__setattr__(chunk, field, torch.Size(found))  # The class is frozen.
    _check_size(getattr(chunk, field), f"{where}.{field}")


def _check_properties(properties: Any, where: str) -> None:
    if type(properties) not in (TensorProperties, LegacyProperties):
        raise _corrupt(f"{where}.properties", "TensorProperties", properties)
    for name, kind in (
        ("memory_format", torch.memory_format),
        ("dtype", torch.dtype),
        ("layout", torch.layout),
        ("requires_grad", bool),
        ("pin_memory", bool),
    ):
        value = getattr(properties, name, None)
        if type(value) is not kind:
            raise _corrupt(f"{where}.properties.{name}", f"a {kind.__name__}", value)


def _check_storage_data(storage_data: Any) -> None:
    if storage_data is None:
        return
    if type(storage_data) is not dict:
        raise _corrupt("Metadata.storage_data", "a dict of MetadataIndex", storage_data)
    for index, info in storage_data.items():
        if type(index) is not MetadataIndex:
            raise _corrupt("Metadata.storage_data", "a MetadataIndex as each key", index)
        if type(info) is not _StorageInfo:
            raise _corrupt(_entry_name(index), "a _StorageInfo", info)
        try:
            path, offset, length = info.relative_path, info.offset, info.length
        except AttributeError as error:
            raise _corrupt(_entry_name(index), f"the field {error.name}", None) from None
        if type(path) is not str:
            raise _corrupt(f"{_entry_name(index)}.relative_path", "a str", path)
        if type(offset) is not int or not 0 <= offset < _INT64_BOUND:
            _check_count(offset, f"{_entry_name(index)}.offset")
        if type(length) is not int or not 0 <= length < _INT64_BOUND:
            _check_count(length, f"{_entry_name(index)}.length")
        if info.transform_descriptors is not None:
            _check_descriptors(info.transform_descriptors, _entry_name(index))


def _check_descriptors(descriptors: Any, where: str) -> None:
    if type(descriptors) not in (list, tuple) or len(descriptors) > MAX_DESCRIPTORS:
        expected = f"a list of at most {MAX_DESCRIPTORS} str"
        raise _corrupt(f"{where}.transform_descriptors", expected, descriptors)
    for descriptor in descriptors:
        if type(descriptor) is not str:
            raise _corrupt(f"{where}.transform_descriptors", "a list of str", descriptor)


def _check_storage_meta(meta: Any) -> None:
    if meta is None:
        return
    if type(meta) is not StorageMeta:
        raise _corrupt("Metadata.storage_meta", "a StorageMeta", meta)
    name = meta.checkpoint_id
    if type(name) not in _TEXT_OR_NONE and not isinstance(name, pathlib.PurePath):
        raise _corrupt("storage_meta.checkpoint_id", "a str, a path or None", name)
    for field in ("save_id", "load_id"):
        if type(getattr(meta, field)) not in _TEXT_OR_NONE:
            raise _corrupt(f"storage_meta.{field}", "a str or None", getattr(meta, field))
    modules = getattr(meta, "modules", None)
    if type(modules) is not list or any(type(module) is not str for module in modules):
        raise _corrupt("storage_meta.modules", "a list of str", modules)


def _entry_name(index: MetadataIndex) -> str:
    return f"storage_data[{brief(index.fqn)}]"


def _check_size(size: Any, where: str) -> None:
    """Check that this is a torch.Size without negative numbers; `size_of` has limited its
    length."""
    if type(size) is not torch.Size:
        raise _corrupt(where, "a torch.Size", size)
    if min(size, default=0) < 0:
        raise _corrupt(where, "numbers from 0 up", min(size))


def _check_count(value: Any, where: str) -> None:
    if type(value) is not int or not 0 <= value < _INT64_BOUND:
        raise _corrupt(where, "an int from 0 to 2**63 - 1", value)


def _corrupt(where: str, expected: str, value: object) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{where}: expected {expected}, got {brief(value)}")
