"""How much space the steps of a run take, each with and without the files that it shares."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pytest_dcp._engine.format.shared_names import own_name
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp._engine.storages.folder_metadata import files_named
from pytest_dcp.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class StepBytes:
    """The space of one step's folder, by the sizes of its files."""

    number: int
    nbytes: int
    """Of all files, shared ones too."""
    own_nbytes: int
    """Of the files that no other step has, which a removal of the step frees."""


def measure_steps(folders: StepFolders) -> list[StepBytes]:
    """All steps of the run, whole or not, ascending. A file that goes meanwhile counts nothing."""
    numbers = folders.numbers()
    shared = {number: _shared_names(folders.folder(number)) for number in numbers}
    uses = Counter(chain.from_iterable(shared.values()))
    return [_measure_step(folders.folder(n), n, {s: uses[s] for s in shared[n]}) for n in numbers]


def _measure_step(folder: Folder, number: int, uses: Mapping[str, int]) -> StepBytes:
    """uses: the shared files that the step has, and by how many steps each is had."""
    nbytes = own_nbytes = 0
    for name in (*folder.names(), *uses):
        try:
            size, links = _size_and_links(folder, name)
        except FileNotFoundError:
            continue
        nbytes += size
        own_nbytes += size if links == 1 and uses.get(name, 1) == 1 else 0
    return StepBytes(number, nbytes, own_nbytes)


def _shared_names(folder: Folder) -> set[str]:
    """The files of a step that other steps may have, too: of an object store."""
    if isinstance(folder.disk, LocalDisk):
        return set()
    with suppress(FileNotFoundError, CheckpointError):
        return {name for name in files_named(folder, METADATA) if own_name(name) is not None}
    return set()


def _size_and_links(folder: Folder, name: str) -> tuple[int, int]:
    if isinstance(folder.disk, LocalDisk):
        status = os.lstat(Path(folder.path) / name)
        return status.st_size, status.st_nlink
    with folder.open(name) as file:
        return file.size, 1
