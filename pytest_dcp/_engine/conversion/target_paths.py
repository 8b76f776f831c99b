"""The target of a conversion: a file or a folder, local or by URL. Mistakes are named before
anything is read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.storages.local_filesystem import disk_of
from pytest_dcp._engine.storages.storage_options import check_storage_options, is_url

PathLike = str | os.PathLike[str]
Options = Mapping[str, Any] | None
"""Of the URL's file system: keys, endpoints."""


def split_options(source: object, target: PathLike, options: Options) -> tuple[Options, Options]:
    """The options for the source and for the target: each gets them if it is a URL.

    source: a path, a URL, or an open checkpoint. Raises ValueError for options of two local paths.
    """
    is_source_url = isinstance(source, str) and is_url(source)
    if not options or not (is_source_url or is_url(target)):
        check_storage_options(options, target)
        return None, None
    return options if is_source_url else None, options if is_url(target) else None


def local_target(target: PathLike) -> Path:
    """The path. Raises ValueError for a URL, which would name a folder here, and an empty path."""
    name = _check_name(target)
    if is_url(target):
        raise ValueError(
            f"the target {name!r} is a URL: give a local path, and copy the result there"
        )
    return Path(name)


def target_folder(target: PathLike, options: Options = None) -> Folder:
    """The folder, which need not exist. Raises ValueError for an empty path, NotADirectoryError if
    a local file has its name.
    """
    name = _check_name(target)
    folder = _open_url(name, options) if is_url(target) else Folder(LocalDisk(), Path(name))
    if isinstance(folder.disk, LocalDisk):
        path = Path(folder.path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "the target is a file", os.fspath(path))
    return folder


def target_file(target: PathLike, options: Options = None) -> tuple[Folder, str]:
    """The folder and the name of a new file, or of one to replace.

    Raises ValueError for an empty path, IsADirectoryError if a local folder has its name, and
    FileNotFoundError if its local folder is missing.
    """
    name = _check_name(target)
    if is_url(target):
        above, _, last = name.rpartition("/")
        if not last or above.endswith(":/"):
            raise ValueError(f"the target {name!r} is no file in a folder")
        folder = _open_url(above, options)
    else:
        last = Path(name).name
        folder = Folder(LocalDisk(), Path(name).parent)
    if isinstance(folder.disk, LocalDisk):
        _check_local_file(Path(folder.path), Path(folder.path) / last)
    return folder, last


def _check_name(target: PathLike) -> str:
    name = os.fspath(target)
    if not name:
        raise ValueError("the target is an empty path")
    return name


def _check_local_file(folder: Path, path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the target file is a folder", os.fspath(path))
    if not folder.is_dir():
        text = f"{os.strerror(errno.ENOENT)}, the target's folder is missing"
        raise FileNotFoundError(errno.ENOENT, text, str(folder))


def _open_url(url: str, options: Options) -> Folder:
    from pytest_dcp._engine.storages.fsspec import open_filesystem

    fs, path = open_filesystem(url, check_storage_options(options, url))
    return Folder(disk_of(fs), path)
