"""The two ways in which a data file of an earlier step becomes part of a new one.

On a local file system by a hard link in the new step's folder, in a store by naming the file where
it is (`shared_files`). All else of an incremental save is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pytest_dcp._engine.format.shared_names import own_name, shared_name
from pytest_dcp._engine.io.commit import OURS
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.steps.link_files import link_files
from pytest_dcp._engine.steps.shared_files import SharedFiles


class FileSharing(Protocol):
    """How a step shares files with an earlier one. All ranks get it from the coordinator."""

    def name_of(self, name: str) -> str:
        """The name, in the index, of a file that the save writes."""

    def is_shareable(self, name: str) -> bool:
        """Whether the file of this name in an earlier index can be part of a later step."""

    def begin_save(self, save: str, needed: Mapping[str, int]) -> list[str]:
        """The coordinator, before anything is written. Returns the names that it has made in the
        step's folder; the save removes the unused ones.

        needed: the files of the earlier step that can be shared, and the bytes that each must have.
        """

    def before_commit(self, save: str, names: Iterable[str]) -> None:
        """The coordinator, when all is written. names: of the files in the index."""


@dataclass(frozen=True, slots=True)
class Linking(FileSharing):
    """By hard links."""

    source: Folder | None
    """Of the earlier step, if there is one."""
    target: Folder

    def name_of(self, name: str) -> str:
        return name

    def is_shareable(self, name: str) -> bool:
        return OURS.fullmatch(name) is not None

    def begin_save(self, save: str, needed: Mapping[str, int]) -> list[str]:
        if self.source is None:
            return []
        return link_files(needed, Path(self.source.path), Path(self.target.path))

    def before_commit(self, save: str, names: Iterable[str]) -> None:
        """Does nothing: the links are the record."""


@dataclass(frozen=True, slots=True)
class Referring(FileSharing):
    """By names of files in the run's folder of shared files."""

    files: SharedFiles
    earlier: int | None
    """The number of the earlier step, if there is one."""

    def name_of(self, name: str) -> str:
        return shared_name(name)

    def is_shareable(self, name: str) -> bool:
        return own_name(name) is not None

    def begin_save(self, save: str, needed: Mapping[str, int]) -> list[str]:
        self.files.begin_save(save, self.earlier)
        return []

    def before_commit(self, save: str, names: Iterable[str]) -> None:
        self.files.note_files(save, names)
