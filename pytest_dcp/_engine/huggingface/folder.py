"""Folders of safetensors files: which files are one checkpoint, and what they hold.

The files are named as torch and Hugging Face name them. `model.safetensors.index.json` maps every
tensor to its file; a folder of shards has none. The engine also writes the id of the save into each
file and the index, so that files of two saves are never taken for one checkpoint:

- with an index, the files that it names are the checkpoint, and must be of its save;
- without one, the files of the newest whole save are the checkpoint, see `saves`. If the files do
  not say how many there are, all of them are, and must be of one save: one id, or no id and one way
  of naming;
- no part of a tensor is in two files.

A folder that breaks a rule raises CheckpointCorruptError naming the file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.catalog_checks import check_catalog, checked_path
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.safetensors_header import (
    FQN_KEY,
    OFFSETS_KEY,
    SHARDING_KEY,
    SIZE_KEY,
    Header,
    StoredTensor,
    counts,
    parse_json,
)
from pytest_dcp._engine.huggingface.saves import (
    DATA_NAME,
    INDEX_NAME,
    LEFT_OVER,
    SAVE_KEY,
    SUFFIX,
    files_of_newest_save,
    number_of,
)
from pytest_dcp._engine.io.disk import Disk
from pytest_dcp._engine.io.read_safetensors import read_header
from pytest_dcp._engine.plan.boxes import overlapping_pairs, pad_rows
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError

MAX_INDEX_BYTES = 100_000_000
"""The same limit as for a header, which holds as much for each tensor."""


def encode_index(weight_map: Mapping[str, str], total_bytes: int, save_id: str | None) -> bytes:
    """The bytes of the index; without a save's id if the files have none."""
    metadata = {"total_size": total_bytes} | ({SAVE_KEY: save_id} if save_id else {})
    index = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2).encode()


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """The contents of an index."""

    weight_map: Mapping[str, str]
    save_id: str | None
    """None in an index that the engine did not write."""


def read_index(disk: Disk, folder: Any, limit: MemoryLimit = DEFAULT_LIMIT) -> WeightIndex | None:
    """The folder's index, or None if there is none."""
    if not disk.exists(folder, INDEX_NAME):
        return None
    with disk.open(folder, INDEX_NAME) as file:
        if file.size > MAX_INDEX_BYTES:
            raise CheckpointCorruptError(
                f"expected an index of at most {MAX_INDEX_BYTES} bytes, got {file.size}",
                file=INDEX_NAME,
            )
        view = memoryview(bytearray(file.size))
        view = view[: file.read_into(0, view)]
    try:
        return decode_index(view, limit)
    except CheckpointCorruptError as error:
        raise error.at(file=INDEX_NAME) from error


def decode_index(text: bytes | memoryview, limit: MemoryLimit = DEFAULT_LIMIT) -> WeightIndex:
    """The contents of an index's bytes. Raises CheckpointCorruptError."""
    index = parse_json(text, "the index", limit)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise CheckpointCorruptError("expected a weight_map and metadata, got others")
    for fqn, name in weight_map.items():
        if type(name) is not str:
            raise CheckpointCorruptError(f"expected a file's name, got {name!r:.200}", entry=fqn)
    for name in set(weight_map.values()):
        checked_path(name)
    save_id = metadata.get(SAVE_KEY)
    return WeightIndex(weight_map, save_id if type(save_id) is str else None)


def read_folder(disk: Disk, folder: Any, limit: MemoryLimit = DEFAULT_LIMIT) -> Catalog:
    """The catalog of the checkpoint in a folder.

    Raises FileNotFoundError if there is none, CheckpointCorruptError if it is not whole.
    """
    index = read_index(disk, folder, limit)
    if index is None:
        names = [name for name in disk.names(folder) if name.endswith(SUFFIX)]
    else:
        names = sorted(set(index.weight_map.values()))
    if not names:
        raise FileNotFoundError(f"no {SUFFIX} files in {folder}")
    headers: Mapping[str, Header] = {n: _header(disk, folder, n, limit) for n in names}
    if index is None:
        headers = files_of_newest_save(headers)
    _check_one_save(headers, index)
    parts = [part for name, header in headers.items() for part in parts_of(name, header, limit)]
    if index is not None:
        parts = _as_mapped(parts, index.weight_map)
    save_id = next(iter(headers.values())).metadata.get(SAVE_KEY)
    return replace(catalog_of(parts), storage_meta=StorageMeta(save_id=save_id))


def files_in_force(disk: Disk, folder: Any) -> set[str]:
    """The files of the folder's checkpoint, and its index; no files if there is no checkpoint.

    Raises CheckpointCorruptError if that cannot be determined.
    """
    index = read_index(disk, folder)
    if index is not None:
        return {INDEX_NAME, *index.weight_map.values()}
    names = [name for name in disk.names(folder) if name.endswith(SUFFIX)]
    return set(files_of_newest_save({name: _header(disk, folder, name) for name in names}))


def next_number(disk: Disk, folder: Any) -> int:
    """The number of the next save to the folder: one more than the highest number of any file."""
    numbers = [0]
    for name in disk.names(folder):
        if DATA_NAME.fullmatch(name):
            with contextlib.suppress(CheckpointCorruptError):
                numbers.append(number_of(_header(disk, folder, name)))
    return max(numbers) + 1


def leased_name(disk: Disk, folder: Any) -> str:
    """The file that identifies the current checkpoint: a later save removes or replaces it."""
    if disk.exists(folder, INDEX_NAME):
        return INDEX_NAME
    return min((name for name in disk.names(folder) if name.endswith(SUFFIX)), default=INDEX_NAME)


def look_of(disk: Disk, folder: Any) -> object:
    """The parts of the folder that any save changes: its names and its index."""
    try:
        index = read_index(disk, folder)
    except (FileNotFoundError, CheckpointCorruptError):
        index = None
    return disk.names(folder), None if index is None else index.save_id


def read_files(disk: Disk, folder: Any, names: Iterable[str], limit: MemoryLimit) -> Catalog:
    """The catalog of these files. Raises CheckpointCorruptError for damaged ones."""
    headers = {checked_path(name): _header(disk, folder, name, limit) for name in names}
    parts = [part for name, header in headers.items() for part in parts_of(name, header, limit)]
    return catalog_of(parts)


def save_named_in(disk: Disk, folder: Any, names: Iterable[str]) -> str | None:
    """The id of the save that the files name; None if they name none, or do not exist."""
    present = [name for name in names if disk.exists(folder, name)]
    try:
        saves = {_header(disk, folder, name).metadata.get(SAVE_KEY) for name in present}
    except CheckpointCorruptError:  # The save that gave the file its name may still be writing it.
        return None
    return saves.pop() if len(saves) == 1 else None


def is_replaceable(disk: Disk, folder: Any, name: str) -> bool:
    """Whether a file was written by this engine or torch's, under a name of theirs."""
    if not DATA_NAME.fullmatch(name):
        return False
    try:
        metadata = _header(disk, folder, name).metadata
    except CheckpointCorruptError:
        return False
    return SAVE_KEY in metadata or SHARDING_KEY in metadata


def remove_leftovers(disk: Disk, folder: Any) -> None:
    """Remove unfinished files of dead saves, so that a full disk has room for the next one."""
    for name in disk.names(folder):
        if LEFT_OVER.fullmatch(name):
            disk.remove(folder, name)


def sweep(disk: Disk, folder: Any, keep: Iterable[str]) -> None:
    """Remove leftovers of earlier saves: their files, complete or not, except the ones to keep.

    Does nothing if a file to keep does not exist: another program then uses its name for a file
    that may be one of these.
    """
    kept, names = set(keep), disk.names(folder)
    if not kept.issubset(names):
        return
    for name in names:
        stale = name not in kept and DATA_NAME.fullmatch(name)
        if LEFT_OVER.fullmatch(name) or (stale and is_replaceable(disk, folder, name)):
            disk.remove(folder, name)


def _header(disk: Disk, folder: Any, name: str, limit: MemoryLimit = DEFAULT_LIMIT) -> Header:
    try:
        with disk.open(folder, name) as file:
            return read_header(file, name, limit)
    except FileNotFoundError as error:
        raise CheckpointCorruptError(
            f"the index names a file that is missing in {folder}", file=name
        ) from error


def _check_one_save(headers: Mapping[str, Header], index: WeightIndex | None) -> None:
    saves = {name: header.metadata.get(SAVE_KEY) for name, header in headers.items()}
    expected = next(iter(saves.values())) if index is None else index.save_id
    for name, save_id in saves.items():
        if save_id != expected:
            whose = "the other files are" if index is None else "the index is"
            raise CheckpointCorruptError(
                f"this is a file of save {save_id!r}, {whose} of {expected!r}: a save to this "
                "folder did not end, or left files of another; remove the ones that do not belong",
                file=name,
            )
    matches = [match for name in headers if (match := DATA_NAME.fullmatch(name))]
    ways = {(match["shard"] is None, match["count"]): match.string for match in matches}
    if index is None and len(ways) > 1:
        raise CheckpointCorruptError(
            f"files of different saves in one folder, without an index: {sorted(ways.values())}; "
            "remove the ones that do not belong",
            file=min(ways.values()),
        )


@dataclass(frozen=True, slots=True)
class Part:
    """One stored box of a tensor."""

    fqn: str
    offset: tuple[int, ...]
    """In the full tensor."""
    size: tuple[int, ...] | None
    """Of the full tensor, if the file says it."""
    tensor: StoredTensor
    file: str
    start: int
    """Bytes from the file's start to the data."""


def parts_of(name: str, header: Header, limit: MemoryLimit = DEFAULT_LIMIT) -> list[Part]:
    """The boxes that a file holds; each is a whole tensor unless the file says otherwise."""
    text = header.metadata.get(SHARDING_KEY)
    try:
        shards = {} if text is None else parse_json(text, SHARDING_KEY, limit)
        return [
            _part(name, header, tensor, shards.get(tensor.name) if text else {OFFSETS_KEY: None})
            for tensor in header.tensors
        ]
    except CheckpointCorruptError as error:
        raise error.at(file=name) from error


def _part(file: str, header: Header, tensor: StoredTensor, shard: Any) -> Part:
    ndim = len(tensor.shape)
    if not isinstance(shard, dict) or OFFSETS_KEY not in shard:
        raise CheckpointCorruptError(f"expected its offset in {SHARDING_KEY}", entry=tensor.name)
    offset, size, fqn = shard[OFFSETS_KEY], shard.get(SIZE_KEY), shard.get(FQN_KEY, tensor.name)
    offset = [0] * ndim if offset is None else offset
    for numbers in (offset, *([] if size is None else [size])):
        if not counts(numbers) or len(numbers) != ndim or max(numbers, default=0) > 1 << 62:
            raise CheckpointCorruptError(
                f"expected {ndim} numbers, got {numbers!r:.200}", entry=tensor.name
            )
    if type(fqn) is not str:
        raise CheckpointCorruptError("expected a tensor's name", entry=tensor.name)
    return Part(
        fqn=fqn,
        offset=tuple(offset),
        size=None if size is None else tuple(size),
        tensor=tensor,
        file=file,
        start=header.data_start + tensor.start,
    )


def _as_mapped(parts: Sequence[Part], weight_map: Mapping[str, str]) -> list[Part]:
    """The parts, except parts that the index has in another file."""
    kept = [part for part in parts if weight_map.get(part.fqn, part.file) == part.file]
    lost = weight_map.keys() - {part.fqn for part in kept}
    if lost:
        fqn = min(lost)
        raise CheckpointCorruptError(
            "the index says that this file has the tensor, and it has not",
            file=weight_map[fqn],
            entry=fqn,
        )
    return kept


def catalog_of(parts: Sequence[Part]) -> Catalog:
    """The catalog of parts that are one checkpoint.

    Raises CheckpointCorruptError if parts of a tensor overlap or do not fit together.
    """
    grouped: dict[str, list[Part]] = {}
    for part in parts:
        grouped.setdefault(part.fqn, []).append(part)
    rows = [part for group in grouped.values() for part in group]
    sizes = [_full_size(fqn, group) for fqn, group in grouped.items()]
    rank = max(map(len, sizes), default=0)
    dtypes = list(dict.fromkeys(part.tensor.dtype for part in rows))
    first = np.cumsum([0, *map(len, grouped.values())], dtype=np.int64)
    index = Index(
        fqns=tuple(grouped),
        property_of=np.array([dtypes.index(g[0].tensor.dtype) for g in grouped.values()], np.int32),
        properties=tuple(TensorProperties(dtype) for dtype in dtypes),
        ndim=np.array([len(size) for size in sizes], dtype=np.int16),
        size=pad_rows(sizes, rank, 1),
        first=first,
        offset=pad_rows([part.offset for part in rows], rank, 0),
        shape=pad_rows([part.tensor.shape for part in rows], rank, 1),
    )
    catalog = Catalog(index, _places(rows))
    check_catalog(catalog)
    _check_apart(index, rows)
    return catalog


def _places(rows: Sequence[Part]) -> EntryPlaces:
    files: dict[str, int] = {}
    file = [files.setdefault(part.file, len(files)) for part in rows]
    start = np.array([part.start for part in rows], dtype=np.int64)
    nbytes = np.array([part.tensor.nbytes for part in rows], dtype=np.int64)
    return EntryPlaces(
        files=tuple(files),
        file=np.array(file, dtype=np.int32),
        start=start,
        length=nbytes,
        data_start=start,
        data_nbytes=nbytes,
        first_sum=np.zeros(len(rows) + 1, dtype=np.int64),
        sums=np.zeros(0, dtype=np.uint32),
    )


def _full_size(fqn: str, group: Sequence[Part]) -> tuple[int, ...]:
    """The size that every part states, or else the extent of the parts."""
    lead = group[0]
    for part in group:
        alike = (part.tensor.dtype, len(part.offset), part.size) == (
            lead.tensor.dtype, len(lead.offset), lead.size
        )  # fmt: skip
        if not alike:
            raise CheckpointCorruptError(
                f"this file has a part of {part.tensor.dtype} of {part.size or part.tensor.shape}, "
                f"{lead.file!r} one of {lead.tensor.dtype} of {lead.size or lead.tensor.shape}: "
                "are they of different saves?",
                file=part.file,
                entry=fqn,
            )
    if lead.size is not None:
        return lead.size
    ends = zip(*(tuple(map(sum, zip(p.offset, p.tensor.shape, strict=True))) for p in group),
               strict=True)  # fmt: skip
    return tuple(max(side) for side in ends)


def _check_apart(index: Index, rows: Sequence[Part]) -> None:
    for key in np.flatnonzero(np.diff(index.first) > 1).tolist():
        chunks = slice(int(index.first[key]), int(index.first[key + 1]))
        for one, other in overlapping_pairs(index.offset[chunks], index.shape[chunks], limit=1):
            files = [rows[chunks.start + row].file for row in (one, other)]
            raise CheckpointCorruptError(
                f"this file and {files[0]!r} hold the same part of the tensor: they are of "
                "different saves; remove the one that does not belong",
                file=files[1],
                entry=index.fqns[key],
            )
        if index.ndim[key] == 0:
            raise CheckpointCorruptError(
                f"{chunks.stop - chunks.start} files hold the same scalar: they are of different "
                "saves; remove the ones that do not belong",
                file=rows[chunks.stop - 1].file,
                entry=index.fqns[key],
            )
