"""Which file each tensor of a save goes to. Pure (no I/O).

Enters: the ranks' tables of items, and the user's mapping of names to file numbers. Leaves: file
numbers for each rank, names with the rows of each file, and errors for items that no file can hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.huggingface.file_names import FILES_KEY, NUMBER_KEY, data_name
from pytest_dcp._engine.plan.columns import BYTES, WriteItems
from pytest_dcp.errors import PlanError

FORMAT = {"DCP_VERSION": "1.0", "format": "pt"}
"""torch 2.13's metadata of each file; other libraries check the format."""
SHOWN = 10


@dataclasses.dataclass(frozen=True, slots=True)
class FolderLayout:
    """The files of a save."""

    numbers: list[dict[int, int]]
    """For each rank, the number of the file for each index of the mapping."""
    highest: int


def check_items(
    tables: Sequence[WriteItems], mapping: Mapping[str, int] | None, *, whole: bool
) -> None:
    """Check that every item can be stored and has a file. Raises PlanError naming the others."""
    problems: dict[str, str] = {}
    for table in {id(table.fqns): table for table in tables}.values() if mapping else ():
        for fqn in table.fqns:
            if mapping is not None and fqn not in mapping:
                problems[fqn] = "is not in fqn_to_index_mapping"
    for table in tables:
        for row in np.flatnonzero(table.kind == BYTES).tolist():
            problems[table.fqns[row]] = "is no tensor: safetensors files hold tensors only"
        parts = (table.shape != table.size).any(axis=1) & (table.kind != BYTES)
        for row in np.flatnonzero(parts).tolist() if whole else ():
            problems[table.fqns[row]] = "is a part of a tensor: pass save_distributed=True"
    if problems:
        listed = [f"{fqn!r} {problem}" for fqn, problem in list(problems.items())[:SHOWN]]
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise PlanError(f"{len(problems)} value(s) have no place:\n" + "\n".join(listed) + more)


def layout_files(
    tables: Sequence[WriteItems], mapping: Mapping[str, int] | None, distributed: bool
) -> FolderLayout:
    """The files: numbered by the mapping, or in order if ranks would share a file."""
    highest = max(mapping.values(), default=1) if mapping else 1
    used = [
        sorted({1 if mapping is None else mapping[fqn] for fqn in set(table.fqns)})
        for table in tables
    ]
    numbers = [{index: index for index in indices} for indices in used]
    if distributed or len({i for indices in used for i in indices}) == sum(map(len, used)):
        return FolderLayout(numbers, highest)
    pairs = sorted((index, rank) for rank, indices in enumerate(used) for index in indices)
    for number, (index, rank) in enumerate(pairs, start=1):
        numbers[rank][index] = number
    return FolderLayout(numbers, len(pairs))


def name_files(
    fqns: Sequence[str], storage_data: Mapping[str, Any], split: Sequence[int] | None
) -> dict[str, list[int]]:
    """The names of a rank's files, and the rows of each. split: the number of each row's file.

    A tensor's second part on the rank goes to another file, with a shard number that no rank has:
    a file has one tensor of a name, and readers take the name for the tensor's.
    """
    mapping: Mapping[str, int] | None = storage_data.get("fqn_to_index_mapping")
    shard: int | None = storage_data.get("shard_index")
    highest = storage_data.get("highest") or max((mapping or {}).values(), default=1)
    highest = max([highest, *(split or ())])
    seen: dict[str, int] = {}
    files: dict[str, list[int]] = {}
    for row, fqn in enumerate(fqns):
        nth = seen[fqn] = seen.get(fqn, -1) + 1
        own = 1 if mapping is None else mapping[fqn]
        number = own if split is None else split[row]
        number = storage_data.get("numbers", {}).get(number, number)
        shard_number = None if shard is None else shard + nth * storage_data.get("ranks", 1)
        files.setdefault(data_name(number, highest, shard_number), []).append(row)
    return files


def count_files(plan: SavePlan, split: Sequence[int] | None) -> int:
    """How many files a rank writes. split: see `name_files`."""
    table, storage_data = WriteItems.of(plan.items), plan.storage_data
    if split is None and len(set(table.fqns)) == len(table.fqns):
        return len(storage_data["numbers"])
    return len(name_files(table.fqns, storage_data, split))


def describe_save(storage_data: Mapping[str, Any]) -> dict[str, str]:
    """A file's description of its save, if known."""
    keys = {FILES_KEY: "files", NUMBER_KEY: "number"}
    return {key: str(storage_data[name]) for key, name in keys.items() if name in storage_data}


def files_of_tensors(catalog: Catalog) -> dict[str, str]:
    """The file of each tensor, for an index."""
    file, files = catalog.places.file.tolist(), catalog.places.files
    keys = catalog.index.key_of.tolist()
    return {catalog.index.fqns[k]: files[n] for k, n in zip(keys, file, strict=True) if n >= 0}


def with_data_at_start(catalog: Catalog) -> Catalog:
    """The catalog with data at the start of each entry, as it is in safetensors files."""
    places = catalog.places
    if (places.data_start == places.start).all():
        return catalog
    places = dataclasses.replace(places, data_start=places.start, data_nbytes=places.length)
    return dataclasses.replace(catalog, places=places)
