"""The header of a manifest: small data of a catalog <-> values of JSON. Pure (no I/O).

Properties and transforms are lists of distinct values, to whose positions columns of the manifest
refer. The data of the planner and the storage is `[how, value]`:

    none                absent
    value               the value itself, in JSON
    paths               the default planner's paths, in columns of the manifest (`planner_paths`)
    pickle              not plain: only the pickle for torch has it

`manifest_columns` writes and reads the header's bytes. Nothing read from a header is trusted: a
value of another type raises ValueError, TypeError or LookupError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import PosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties

from pytest_dcp._engine.format import planner_paths
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.plan.packed_names import Fqns, PackedNames

_SAID = ("planner_data", "storage_meta", "version")
_NONE, IN_PICKLE, _PATHS, _VALUE = "none", "pickle", "paths", "value"

_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_LAYOUTS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)}
_FORMATS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.memory_format)}


def name_properties(properties: TensorProperties) -> list[Any]:
    """The properties, each by its name or as a boolean."""
    p = properties
    return [str(p.dtype), str(p.layout), p.requires_grad, str(p.memory_format), p.pin_memory]


def number_transforms(places: EntryPlaces) -> tuple[list[list[str]], NDArray[np.int32]]:
    """The distinct lists of descriptors, and the position of each chunk's list, or -1.

    If no chunk was transformed, the column is empty.
    """
    positions: dict[tuple[str, ...], int] = {}
    column = np.full(len(places.file) if places.transforms else 0, -1, dtype=np.int32)
    for row, descriptors in places.transforms.items():
        column[row] = positions.setdefault(tuple(descriptors), len(positions))
    return [list(some) for some in positions], column


def encode_extras(catalog: Catalog) -> tuple[dict[str, Any], NDArray[np.int32], bytes]:
    """The data of planner and storage, and the two columns of the planner's paths."""
    packed = planner_paths.pack_paths(catalog.planner_data, catalog.index.fqns)
    extras = {
        "planner_data": [IN_PICKLE if packed is None else _PATHS],
        "storage_meta": _encode_storage_meta(catalog.storage_meta),
        "version": [_VALUE, catalog.version] if _is_text(catalog.version) else [IN_PICKLE],
    }
    if catalog.planner_data is None:
        extras["planner_data"] = [_NONE]
    return extras, *(packed or (np.zeros(0, dtype=np.int32), b""))


def _encode_storage_meta(meta: StorageMeta | None) -> list[Any]:
    if meta is None:
        return [_NONE]
    fields = dict(meta.__dict__) if type(meta) is StorageMeta else {}
    folder = fields.pop("checkpoint_id", None)
    modules = fields.get("modules")
    standard = fields.keys() == {"save_id", "load_id", "modules"} and isinstance(modules, list)
    plain = standard and all(
        map(_is_text, (fields["save_id"], fields["load_id"], *fields["modules"]))
    )
    kind = type(folder).__name__
    text = None if folder is None else str(folder)
    if not plain or type(folder) not in (type(None), str, PosixPath) or not _is_text(text):
        return [IN_PICKLE]
    return [_VALUE, {**fields, "checkpoint_id": [kind, text]}]


def _is_text(value: object) -> bool:
    """None, or a string that survives JSON (which joins the halves of a surrogate pair)."""
    return value is None or (type(value) is str and json.loads(json.dumps(value)) == value)


def read_properties(fields: Sequence[Any]) -> TensorProperties:
    """The inverse of `name_properties`."""
    dtype, layout, requires_grad, memory_format, pin_memory = fields
    if type(requires_grad) is not bool or type(pin_memory) is not bool:
        raise ValueError(f"properties {fields!r:.200}")
    return TensorProperties(
        _DTYPES[dtype], _LAYOUTS[layout], requires_grad, _FORMATS[memory_format], pin_memory
    )


def read_transforms(
    descriptor_lists: Sequence[Sequence[str]], column: NDArray[np.int32]
) -> dict[int, tuple[str, ...]]:
    """The inverse of `number_transforms`: the descriptors of each transformed chunk, by row."""
    descriptors = [tuple(_text(text) for text in some) for some in descriptor_lists]
    rows = np.flatnonzero(column >= 0)
    which = column[rows].tolist()
    return {row: descriptors[i] for row, i in zip(rows.tolist(), which, strict=True)}


def decode_extras(
    extras: Mapping[str, Sequence[Any]],
    fqns: Fqns | PackedNames,
    columns: Mapping[str, NDArray[Any]],
    whole: Callable[[], Metadata],
    *,
    check_paths: bool = True,
) -> dict[str, Any]:
    """The inverse of `encode_extras`, as attributes of a catalog.

    whole: reads the metadata from the pickle; called only if the header refers to it. check_paths:
    check each of the planner's paths now; otherwise when it is used.
    """
    found: dict[str, Any] = {}
    metadata: Metadata | None = None
    for name in _SAID:
        how, *value = extras[name]
        if how == IN_PICKLE:
            metadata = metadata or whole()
            found[name] = getattr(metadata, name)
        elif how == _NONE:
            found[name] = None
        elif how == _PATHS and name == "planner_data":
            text = columns["paths"].tobytes()
            found[name] = planner_paths.unpack_paths(
                fqns, columns["path_forms"], text, check_each=check_paths
            )
        elif how == _VALUE and name == "storage_meta":
            found[name] = _decode_storage_meta(*value)
        elif how == _VALUE and name == "version":
            found[name] = _text_or_none(*value)
        else:
            raise ValueError(f"{how!r:.80} for {name}")
    return found


def _decode_storage_meta(fields: Mapping[str, Any]) -> StorageMeta:
    kind, folder = fields["checkpoint_id"]
    if (kind == "NoneType") is not (_text_or_none(folder) is None) or kind not in _FOLDERS:
        raise ValueError(f"checkpoint_id {fields['checkpoint_id']!r:.200}")
    return StorageMeta(
        checkpoint_id=None if folder is None else _FOLDERS[kind](folder),
        save_id=_text_or_none(fields["save_id"]),
        load_id=_text_or_none(fields["load_id"]),
        modules=[_text(module) for module in fields["modules"]],
    )


_FOLDERS: dict[str, Callable[[str], Any]] = {"NoneType": str, "str": str, "PosixPath": PosixPath}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r:.80}")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)
