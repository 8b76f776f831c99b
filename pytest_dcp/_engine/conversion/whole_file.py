"""New files and folders that are complete, or do not exist; the shared parts of all conversions.

A file is written under a temporary name, `.NAME.dcp-ID.tmp`, and renamed when it is complete and
synced. A conversion that is killed leaves the temporary file. The next one to the same target
removes it:

- While a conversion writes, it holds a lock (flock) on its temporary file. The kernel releases the
  lock when the process ends, however it ends.
- The next conversion takes the lock of every file of this pattern, without waiting. If it gets the
  lock, the owner is dead, and the file is removed. A file that is locked is left alone.
- In the moment between the making of a file and its lock, another conversion may take it for a
  leftover. So the owner looks, after it has the lock, whether the name still leads to the file, and
  begins again with another name if not.

A file system without such locks, and an object store, keep the leftovers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.io.disk import Out
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp.tracebacks import add_note

LONGEST_STEM = 200
"""Bytes of a target's name in the temporary one: file systems allow 255 for the whole."""
TRIES = 10
"""Of new names: each is lost only to another conversion's search in the same microseconds."""


@contextlib.contextmanager
def write_whole_file(folder: Folder, name: str) -> Iterator[Out]:
    """A new file. At the end it gets the name, and is synced; after a failure it is removed."""
    remove_unfinished(folder, name)
    created: list[str] = []
    try:
        with contextlib.ExitStack() as until_renamed:
            with contextlib.ExitStack() as until_written:
                out = _create(folder, name, created, until_written, until_renamed)
                yield out
                out.sync()  # Before the rename: the new name must not survive without its bytes.
            folder.replace(created[-1], name)
    except BaseException as error:
        # Ctrl-C may come as soon as the file exists.
        for temporary in created:
            try:
                folder.remove(temporary)
            except OSError as more:
                add_note(error, f"{temporary} is still there: {more!r}")
        raise
    folder.sync()


def remove_unfinished(folder: Folder, name: str) -> None:
    """Remove the temporary files of conversions to this target whose processes are dead."""
    if not isinstance(folder.disk, LocalDisk):
        return
    pattern = re.compile(rf"\.{re.escape(_stem(name))}\.dcp-[0-9a-f]{{16}}\.tmp")
    for found in filter(pattern.fullmatch, folder.names()):
        path = Path(folder.path) / found
        with contextlib.suppress(OSError), _locked_file(path) as is_locked:
            if is_locked:
                operating_system.remove_file(path)


@contextlib.contextmanager
def remove_if_new(folder: Folder) -> Iterator[None]:
    """After a failure inside, a local folder is removed if it is empty and did not exist before."""
    path = Path(folder.path) if isinstance(folder.disk, LocalDisk) else None
    is_new = path is not None and not path.exists()
    try:
        yield
    except BaseException:
        if path is not None and is_new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _create(
    folder: Folder,
    name: str,
    created: list[str],
    until_written: contextlib.ExitStack,
    until_renamed: contextlib.ExitStack,
) -> Out:
    """A new file of a temporary name, the last one in `created`; it is locked if possible."""
    for _ in range(TRIES):
        created.append(f".{_stem(name)}.dcp-{secrets.token_hex(8)}.tmp")
        file = contextlib.ExitStack()
        out = until_written.enter_context(folder.create(created[-1]))
        if not isinstance(folder.disk, LocalDisk):
            return out
        path = Path(folder.path) / created[-1]
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            file.enter_context(_locked_file(path))
            until_renamed.push(file)
            return out
    raise FileExistsError(f"other conversions to {name} remove this one's files: {created[-1]}")


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[bool]:
    """Whether the file of this name is locked by this process inside; False without locks.

    Raises BlockingIOError while another process has the lock, and FileNotFoundError if the name
    does not lead to the file any more.
    """
    if operating_system.open_files_hold_their_names():
        yield False  # Only a closed file can be renamed or removed.
        return
    fd = os.open(path, operating_system.READ | operating_system.NO_LINK)
    try:
        status = os.fstat(fd)
        is_locked = stat.S_ISREG(status.st_mode) and operating_system.lock_file(fd, shared=False)
        if not os.path.samestat(status, path.lstat()):
            raise FileNotFoundError(path)
        yield is_locked
    finally:
        os.close(fd)


def _stem(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONGEST_STEM else hashlib.sha256(encoded).hexdigest()
