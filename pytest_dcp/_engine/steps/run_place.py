"""Where a run's steps are: a folder or a URL, and how the verbs reach the steps there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp._engine.storages.local_filesystem import disk_of


@dataclass(frozen=True, slots=True)
class RunPlace:
    """A run's folder as a caller names it, and what its file system needs."""

    folder: str | os.PathLike[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the URL's file system: keys, endpoints. Not used for a path."""

    def open_folders(self) -> StepFolders:
        """The folders of the steps. Raises TypeError for anything else than a path or a URL."""
        folder = self.folder
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise TypeError(f"the folder of a run is a path or a URL, got {folder!r}")
        if isinstance(folder, PurePath) or "://" not in os.fspath(folder):
            path = Path(os.path.abspath(folder))
            return StepFolders(Folder(LocalDisk(), path), path)
        from pytest_dcp._engine.storages.fsspec import FileSystem, open_filesystem

        fs, path_or_url = open_filesystem(folder, dict(self.options))
        if not isinstance(fs, FileSystem):
            path = Path(os.fspath(path_or_url))
            return StepFolders(Folder(LocalDisk(), path), path)
        own_path = fs.path_of[os.fspath(folder)]
        return StepFolders(Folder(disk_of(fs), own_path), os.fspath(folder))

    def for_saving(self, checkpoint_id: Any) -> dict[str, Any]:
        """The arguments of `save` that name a step's place."""
        if not self._needs_options(checkpoint_id):
            return {"checkpoint_id": checkpoint_id}
        from pytest_dcp._engine.storages.fsspec import FsspecWriter

        writer = FsspecWriter(checkpoint_id, **self.options)
        return {"checkpoint_id": checkpoint_id, "storage_writer": writer}

    def for_loading(self, checkpoint_id: Any) -> dict[str, Any]:
        """The arguments of `load` that name a step's place."""
        if not self._needs_options(checkpoint_id):
            return {"checkpoint_id": checkpoint_id}
        from pytest_dcp._engine.storages.fsspec import FsspecReader

        reader = FsspecReader(checkpoint_id, **self.options)
        return {"checkpoint_id": checkpoint_id, "storage_reader": reader}

    def _needs_options(self, checkpoint_id: Any) -> bool:
        return bool(self.options) and not isinstance(checkpoint_id, Path)
