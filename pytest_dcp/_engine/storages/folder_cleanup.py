"""When a save removes files of a folder, and by which rule: a part of the writer of checkpoints in
folders. `io.commit` tells leftovers from the files of a checkpoint.

    leftovers of dead saves              before anything is written: a full disk then has room
    files of earlier saves               after the commit
    the checkpoint of the whole          after every rank has committed its own part
    this save's own files, if it fails   at the end, unless it was committed after all

A file that a checkpoint of the folder names is never removed. Where a subclass chooses the place of
the metadata, other checkpoints of the folder are unknown, so files of other saves stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from pytest_dcp._engine.io.commit import is_leftover, metadata_name, remove_unnamed
from pytest_dcp._engine.io.disk import Disk
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.registering_disk import CreatedFiles, RegisteringDisk
from pytest_dcp._engine.plan.hooks import is_overridden
from pytest_dcp._engine.plan.storage_capabilities import cleans_up
from pytest_dcp._engine.storages import local_filesystem
from pytest_dcp._engine.storages.folder_metadata import FolderOfCheckpoint, files_named
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

logger = logging.getLogger("pytest_dcp.checkpoint")


class FolderCleanup(FolderOfCheckpoint):
    """Removes files of the folder that a writer writes to."""

    sync_files: bool
    """Whether to wait for stable storage."""
    save_id: str
    """Of the current save."""
    rank: int | None
    """This rank; None: not set yet."""
    use_collectives: bool
    """Whether all ranks commit together."""
    _created_files: CreatedFiles
    """Files that this rank has created on the disk for this save."""
    _cleaned_for: str | None
    """The save for which leftovers of dead saves have been removed."""

    def remove_leftovers(self) -> None:
        """Remove leftovers of dead saves, so that a full disk has room for this one.

        The engine calls it before anything is written, even if a subclass replaces other steps.
        """
        if self._cleaned_for != self.save_id:
            self._cleaned_for = self.save_id
            self._remove_leftovers(self._folder())

    def _remove_leftovers(self, folder: Folder) -> None:
        if self.use_collectives and any(map(is_leftover, folder.names())):
            with folder.locked():
                self._clean(remove_unnamed)

    def _clean(self, remove: Callable[..., object]) -> None:
        """Remove files of earlier saves; an error here does not fail the save."""
        if is_overridden(self, FolderOfCheckpoint, "_get_metadata_path"):
            # It cannot be known which files other checkpoints of the folder name.
            return
        folder = self._folder()
        try:
            remove(folder, lambda name: files_named(folder, name))
        except (OSError, CheckpointCorruptError) as error:
            logger.warning("%s: files of earlier saves are still there: %r", self.path, error)

    def register_files(self, names: Iterable[str]) -> None:
        """Let `discard` also remove files of these names, which other processes write."""
        self._created_files |= {(self.path, name): None for name in names}

    def discard(self) -> None:
        """Remove this rank's files of a save that failed, unless it was committed after all."""
        disk, created_files, self._created_files = self._disk(), self._created_files, {}
        for path in dict.fromkeys(path for path, _ in created_files):
            folder = Folder(disk, path)
            with folder.locked():
                committed = self._committed_files(folder)
                for name in [name for place, name in created_files if place == path]:
                    if name not in committed:
                        folder.remove(name)

    def _committed_files(self, folder: Folder) -> set[str]:
        """The files of the folder that a checkpoint consists of.

        Raises CheckpointCorruptError if that cannot be determined.
        """
        names: set[str] = set()
        for rank in dict.fromkeys((None, self.rank)):
            place, name = self._metadata_place(folder.disk, rank)
            if place.exists(name):
                names |= {name, *files_named(place, name)}
        return names

    def remove_collective_metadata(self) -> None:
        """Remove the checkpoint of the whole, after every rank has committed its own part.

        Before that a reader finds the old checkpoint, after that the ranks' own.
        """
        folder, name = self._folder(), metadata_name()
        if not folder.exists(name):
            return
        with folder.locked():
            with folder.between_leases(name):
                folder.remove(name)
            if self.sync_files:
                folder.sync()
            self._clean(remove_unnamed)

    def _disk(self) -> Disk:
        return local_filesystem.disk_of(self.fs)

    def _folder(self) -> Folder:
        return Folder(self._disk(), self.path)

    def _registering_folder(self, path: Any = None) -> Folder:
        """This folder, or the one of this path, for all files that a save makes: see `discard`."""
        disk = RegisteringDisk(self._disk(), self._created_files)
        return Folder(disk, self.path if path is None else path)


def discard_files(writer: object, work: str) -> None:
    """Remove the writer's files of work that failed, whose own error takes precedence.

    work: "save", for the log.
    """
    if cleans_up(writer):
        try:
            writer.discard()
        except (OSError, CheckpointError) as error:
            logger.warning("files of a failed %s are still there: %r", work, error)
