"""Where a run's steps are: a folder or a URL, and how the verbs reach the steps there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp._engine.storages.local_filesystem import disk_of
from pytest_dcp._engine.storages.storage_options import check_storage_options, is_url


@dataclass(frozen=True, slots=True)
class RunPlace:
    """A run's folder as a caller names it, and what its file system needs."""

    folder: str | os.PathLike[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the URL's file system: keys, endpoints."""

    def open_folders(self) -> StepFolders:
        """The folders of the steps.

        Raises TypeError for anything else than a path or a URL, ValueError for options that do not
        belong to it.
        """
        folder = self.folder
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise TypeError(f"the folder of a run is a path or a URL, got {folder!r}")
        options = check_storage_options(self.options, folder)
        if not is_url(folder):
            path = Path(os.path.abspath(folder))
            return StepFolders(Folder(LocalDisk(), path), path)
        from pytest_dcp._engine.storages.fsspec import FileSystem, open_filesystem

        fs, path_or_url = open_filesystem(folder, options)
        if not isinstance(fs, FileSystem):
            path = Path(os.fspath(path_or_url))
            return StepFolders(Folder(LocalDisk(), path), path)
        own_path = fs.path_of[os.fspath(folder)]
        return StepFolders(Folder(disk_of(fs), own_path), os.fspath(folder))

    def arguments_for(self, checkpoint_id: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `save` and `load` for a step's place, with the caller's own keywords.

        A storage among these has its own options.
        """
        place: dict[str, Any] = {"checkpoint_id": checkpoint_id}
        if self.options and not {"storage_writer", "storage_reader"} & set(keywords):
            place["storage_options"] = self.options
        return place | dict(keywords)
