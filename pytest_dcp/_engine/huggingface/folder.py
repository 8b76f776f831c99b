"""Folders of safetensors files: which files are one checkpoint, and what they hold.

The files are named as torch and Hugging Face name them. `model.safetensors.index.json` maps every
tensor to its file; a folder of shards has none. The engine also writes the id of the save into each
file and the index, so that files of two saves are never taken for one checkpoint:

- with an index, the files that it names are the checkpoint, and must be of its save;
- without one, the files of the newest whole save are the checkpoint (`file_names`). If the files do
  not say how many there are, all of them are, and must be of one save: one id, or no id and one way
  of naming;
- no part of a tensor is in two files.

A folder that breaks a rule raises CheckpointCorruptError naming the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch.distributed.checkpoint.metadata import StorageMeta

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_checks import checked_path
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.safetensors_header import SHARDING_KEY, Header
from pytest_dcp._engine.huggingface.file_names import (
    DATA_NAME,
    INDEX_NAME,
    LEFT_OVER,
    SAVE_KEY,
    SUFFIX,
    files_of_newest_save,
    number_of,
)
from pytest_dcp._engine.huggingface.stored_parts import catalog_of, parts_of, select_mapped_parts
from pytest_dcp._engine.huggingface.weight_index import WeightIndex, read_index
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.read_safetensors import read_header
from pytest_dcp.errors import CheckpointCorruptError, CheckpointReplacedError


def read_folder(folder: Folder, limit: MemoryLimit = DEFAULT_LIMIT) -> Catalog:
    """The catalog of the checkpoint in a folder.

    Raises FileNotFoundError if there is none, CheckpointCorruptError if it is not whole.
    """
    index = read_index(folder, limit)
    if index is None:
        names = [name for name in folder.names() if name.endswith(SUFFIX)]
    else:
        names = sorted(set(index.weight_map.values()))
    if not names:
        raise FileNotFoundError(f"no {SUFFIX} files in {folder}")
    headers: Mapping[str, Header] = {n: _header(folder, n, limit) for n in names}
    if index is None:
        headers = files_of_newest_save(headers)
    _check_one_save(headers, index)
    parts = [part for name, header in headers.items() for part in parts_of(name, header, limit)]
    if index is not None:
        parts = select_mapped_parts(parts, index.weight_map)
    save_id = next(iter(headers.values())).metadata.get(SAVE_KEY)
    return replace(catalog_of(parts), storage_meta=StorageMeta(save_id=save_id))


def read_settled(
    find_folder: Callable[[], Folder], current: Folder, limit: MemoryLimit = DEFAULT_LIMIT
) -> Catalog:
    """The catalog of the checkpoint; read again as long as saves change the folder meanwhile.

    find_folder: gives the folder for each try. current: the folder without open files.
    """
    look: object = None
    while True:
        try:
            return read_folder(find_folder(), limit)
        except (CheckpointCorruptError, FileNotFoundError, CheckpointReplacedError):
            before, look = look, read_changing_parts(current)
            if before == look:
                raise


def files_in_force(folder: Folder) -> set[str]:
    """The files of the folder's checkpoint, and its index; no files if there is no checkpoint.

    Raises CheckpointCorruptError if that cannot be determined.
    """
    index = read_index(folder)
    if index is not None:
        return {INDEX_NAME, *index.weight_map.values()}
    names = [name for name in folder.names() if name.endswith(SUFFIX)]
    return set(files_of_newest_save({name: _header(folder, name) for name in names}))


def next_number(folder: Folder) -> int:
    """The number of the next save to the folder: one more than the highest number of any file."""
    numbers = [0]
    for name in folder.names():
        if DATA_NAME.fullmatch(name):
            with contextlib.suppress(CheckpointCorruptError):
                numbers.append(number_of(_header(folder, name)))
    return max(numbers) + 1


def leased_name(folder: Folder) -> str:
    """The file that identifies the current checkpoint: a later save removes or replaces it."""
    if folder.exists(INDEX_NAME):
        return INDEX_NAME
    return min((name for name in folder.names() if name.endswith(SUFFIX)), default=INDEX_NAME)


def read_changing_parts(folder: Folder) -> object:
    """The parts of the folder that any save changes: its names and its index."""
    try:
        index = read_index(folder)
    except (FileNotFoundError, CheckpointCorruptError):
        index = None
    return folder.names(), None if index is None else index.save_id


def read_files(folder: Folder, names: Iterable[str], limit: MemoryLimit) -> Catalog:
    """The catalog of these files. Raises CheckpointCorruptError for damaged ones."""
    headers = {checked_path(name): _header(folder, name, limit) for name in names}
    parts = [part for name, header in headers.items() for part in parts_of(name, header, limit)]
    return catalog_of(parts)


def save_named_in(folder: Folder, names: Iterable[str]) -> str | None:
    """The id of the save that the files name; None if they name none, or do not exist."""
    present = [name for name in names if folder.exists(name)]
    try:
        saves = {_header(folder, name).metadata.get(SAVE_KEY) for name in present}
    except CheckpointCorruptError:  # The save that gave the file its name may still be writing it.
        return None
    return saves.pop() if len(saves) == 1 else None


def is_replaceable(folder: Folder, name: str) -> bool:
    """Whether a file was written by this engine or torch's, under a name of theirs."""
    if not DATA_NAME.fullmatch(name):
        return False
    try:
        metadata = _header(folder, name).metadata
    except CheckpointCorruptError:
        return False
    return SAVE_KEY in metadata or SHARDING_KEY in metadata


def remove_leftovers(folder: Folder) -> None:
    """Remove unfinished files of dead saves, so that a full disk has room for the next one."""
    for name in folder.names():
        if LEFT_OVER.fullmatch(name):
            folder.remove(name)


def sweep(folder: Folder, keep: Iterable[str]) -> None:
    """Remove leftovers of earlier saves: their files, complete or not, except the ones to keep.

    Does nothing if a file to keep does not exist: another program then uses its name for a file
    that may be one of these.
    """
    keep_names, names = set(keep), folder.names()
    if not keep_names.issubset(names):
        return
    for name in names:
        stale = name not in keep_names and DATA_NAME.fullmatch(name)
        if LEFT_OVER.fullmatch(name) or (stale and is_replaceable(folder, name)):
            folder.remove(name)


def _header(folder: Folder, name: str, limit: MemoryLimit = DEFAULT_LIMIT) -> Header:
    try:
        with folder.open(name) as file:
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
