"""The target of a conversion as a local path. Mistakes are named before anything is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

PathLike = str | os.PathLike[str]


def local_target(target: PathLike) -> Path:
    """The path. Raises ValueError for a URL, which would name a folder here, and an empty path."""
    name = os.fspath(target)
    if not name:
        raise ValueError("the target is an empty path")
    if isinstance(target, str) and "://" in name:
        raise ValueError(
            f"the target {name!r} is a URL: give a local path, and copy what is written there"
        )
    return Path(name)


def target_file(target: PathLike) -> Path:
    """The path of a new file, or of one to replace.

    Raises as `local_target`, IsADirectoryError if a folder has its name, and FileNotFoundError if
    its folder is missing.
    """
    path = local_target(target)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "the target file is a folder", os.fspath(path))
    if not path.parent.is_dir():
        text = f"{os.strerror(errno.ENOENT)}, the target's folder is missing"
        raise FileNotFoundError(errno.ENOENT, text, str(path.parent))
    return path
