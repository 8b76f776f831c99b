"""How much space the steps of a run take, each with and without the files that it shares."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.step_folders import StepFolders


@dataclass(frozen=True, slots=True)
class StepBytes:
    """The space of one step's folder, by the sizes of its files."""

    number: int
    nbytes: int
    """Of all files, as many as a copy of the folder takes."""
    own_nbytes: int
    """Of the files with one name, which a removal of the step frees. In an object store all."""


def measure_steps(folders: StepFolders) -> list[StepBytes]:
    """All steps of the run, whole or not, ascending. A file that goes meanwhile counts nothing."""
    return [_measure_folder(number, folders.folder(number)) for number in folders.numbers()]


def _measure_folder(number: int, folder: Folder) -> StepBytes:
    nbytes = own_nbytes = 0
    for name in folder.names():
        try:
            size, links = _size_and_links(folder, name)
        except FileNotFoundError:
            continue
        nbytes += size
        own_nbytes += size if links == 1 else 0
    return StepBytes(number, nbytes, own_nbytes)


def _size_and_links(folder: Folder, name: str) -> tuple[int, int]:
    if isinstance(folder.disk, LocalDisk):
        status = os.lstat(Path(folder.path) / name)
        return status.st_size, status.st_nlink
    with folder.open(name) as file:
        return file.size, 1
