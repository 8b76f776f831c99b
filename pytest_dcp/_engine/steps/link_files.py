"""Hard links between the folders of a run's steps, on a local file system."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pytest_dcp._engine.io.commit import METADATA, OURS
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp.errors import CheckpointError

NOT_THIS_FILE = frozenset((errno.EMLINK, errno.ENOENT, errno.EEXIST))
"""It has as many names as it can have, or is gone: its blocks are written anew."""
NO_LINKS = frozenset(
    (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV)
)
"""Errors by which a file system says that it makes no hard links."""


class NoHardLinksError(CheckpointError):
    """The file system of a run makes no hard links."""


def link_files(needed: Mapping[str, int], source: Path, target: Path) -> list[str]:
    """Link files of one folder into another; returns the names of the linked ones.

    needed: the bytes that each file must have. Left out are files that are gone, that are shorter,
    or that are no plain files of the folder itself.

    Raises NoHardLinksError, and OSError for any other failure; then nothing is linked.
    """
    linked: list[str] = []
    try:
        for name, nbytes in needed.items():
            if _link_file(source / name, target / name, nbytes):
                linked.append(name)
    except OSError as error:
        for name in linked:
            (target / name).unlink(missing_ok=True)
        if error.errno in NO_LINKS:
            raise NoHardLinksError(
                f"the file system of {target} makes no hard links ({error.strerror})"
            ) from error
        raise
    return linked


def _link_file(source: Path, target: Path, nbytes: int) -> bool:
    """Whether the file is linked now."""
    try:
        before = os.lstat(source)
        if not stat.S_ISREG(before.st_mode) or before.st_size < nbytes:
            return False
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in NOT_THIS_FILE:
            return False
        raise
    # Something else may have taken the name since it was looked at.
    after = os.lstat(target)
    if stat.S_ISREG(after.st_mode) and after.st_size >= nbytes:
        return True
    target.unlink()
    return False


def drop_links(folder: Folder) -> None:
    """Remove the links that a save which has not ended has made to files of other steps.

    Only in a folder without an index, and only data files that have another name somewhere: they
    belong to another step, and would take space as long as this folder is there.
    """
    if folder.exists(METADATA):
        return
    for name in folder.names():
        path = Path(folder.path) / name
        if OURS.fullmatch(name):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                folder.remove(name)
