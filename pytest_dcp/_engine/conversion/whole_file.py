"""New files and folders that are complete, or do not exist; the shared parts of all conversions."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pytest_dcp._engine import operating_system


@contextlib.contextmanager
def replace_at_end(target: Path) -> Iterator[int]:
    """The descriptor of a new file. At the end it gets the name; after a failure it is removed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | operating_system.NEW_FILE
    try:
        # Inside, since Ctrl-C may come as soon as the file exists.
        fd = os.open(temporary, flags, 0o666)
        try:
            yield fd
            operating_system.sync_file(fd)
        finally:
            os.close(fd)
        operating_system.replace_file(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if operating_system.can_open_folders():
        folder = operating_system.open_folder(target.parent)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def remove_if_new(folder: Path) -> Iterator[None]:
    """After a failure inside, the folder is removed if it is empty and did not exist before."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
