"""The local disk: folders and names, by file descriptors.

No name in a checkpoint leads out of its folder; a lock on the folder keeps commits apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.format.shared_names import SHARED_FOLDER, missing_file, own_name
from pytest_dcp._engine.io.disk import In, Out
from pytest_dcp._engine.io.lease import hold_lease, wait_for_leases
from pytest_dcp._engine.io.local_file import (
    LocalIn,
    LocalOut,
    kind_of,
    kind_of_device,
    name_file,
)
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError
from pytest_dcp.tracebacks import warn_caller

LOCK_S = 120.0
"""How long a commit waits for another save's: they take milliseconds."""
CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors by which a file system (SMB or 9p mounts, some in user space) reports that it cannot fsync
folders."""
NETWORK_KINDS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "gpfs", "beegfs", "pvfs2", "glusterfs", "afs"}
    | {"9p", "virtiofs", "ocfs2", "gfs2", "wekafs", "daos", "fuse"}
)
"""File systems that other machines share, by their names in mountinfo."""
UNREAL_KINDS = frozenset(
    ("proc", "sysfs", "debugfs", "tracefs", "securityfs", "configfs", "cgroup", "cgroup2", "bpf")
)
"""File systems whose files the kernel generates when they are read: no link may lead there."""


class LocalDisk:
    """The local disk, by file descriptors."""

    renames = True
    follow_links = False

    def __init__(self, *, follow_links: bool = False) -> None:
        """follow_links: whether a link in a folder may lead out of it, to a plain file.

        A name may never do so: the checkpoint's writer chose the name, while the folder's owner
        made the link.
        """
        self.follow_links = follow_links

    def make_folder(self, folder: Path) -> list[Path]:
        folder = Path(folder)
        missing = [path for path in folder.parents if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        return [path.parent for path in (folder, *missing)]

    def names(self, folder: Path) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return sorted(e.name for e in entries if not e.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def is_remote(self, folder: Path) -> bool:
        """Whether the folder is on a network file system, or on one that a process serves."""
        try:
            return _is_network_device(os.stat(folder).st_dev)
        except OSError:
            return False

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        if not operating_system.can_open_folders():
            yield  # a commit is as safe as a rename
            return
        fd = operating_system.open_folder(folder)
        try:
            _lock(fd, folder)
            yield
        finally:
            os.close(fd)

    def leased(self, folder: Path, name: str) -> AbstractContextManager[None]:
        return hold_lease(folder, name)

    def between_leases(self, folder: Path, name: str) -> AbstractContextManager[None]:
        return wait_for_leases(folder, name)

    def exists(self, folder: Path, name: str) -> bool:
        return (Path(folder) / name).is_file()

    @contextlib.contextmanager
    def create(self, folder: Path, name: str) -> Iterator[Out]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | operating_system.NEW_FILE
        path = Path(folder) / name
        fd = os.open(path, flags, 0o666)
        try:
            yield LocalOut(fd, path)
        finally:
            _close(fd, path)

    @contextlib.contextmanager
    def open(self, folder: Path, name: str) -> Iterator[In]:
        own = own_name(name)
        if own is None:
            fd = _open_inside(folder, name, follow_links=self.follow_links)
        else:
            fd = _open_shared(folder, name, own, follow_links=self.follow_links)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointCorruptError("not a plain file", file=name)
            file = LocalIn(fd, status.st_size, kind_of(status), Path(folder) / name)
            try:
                yield file
            finally:
                file.close()
        finally:
            os.close(fd)

    def replace(self, folder: Path, old: str, new: str) -> None:
        operating_system.replace_file(Path(folder) / old, Path(folder) / new)

    def remove(self, folder: Path, name: str) -> None:
        operating_system.remove_file(Path(folder) / name)

    def sync_folder(self, folder: Path) -> None:
        if not operating_system.can_open_folders():
            return
        fd = operating_system.open_folder(folder)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in CANNOT_SYNC_FOLDERS:
                name_file(error, folder)
                raise
            _warn_of_unsynced(os.fstat(fd).st_dev, folder, error.errno)
        finally:
            os.close(fd)


@lru_cache(maxsize=64)
def _is_network_device(device: int) -> bool:
    """Whether a mounted device is a network file system, or one that a process serves."""
    numbers = operating_system.device_numbers(device)
    kind = numbers and kind_of_device(*numbers)
    return kind is not None and (kind in NETWORK_KINDS or kind.startswith("fuse."))


@lru_cache(maxsize=64)
def _warn_of_unsynced(device: int, folder: Path, code: int) -> None:
    """Warn once per folder that its file system cannot give a guarantee that others give."""
    warn_caller(
        f"{folder} is on a file system that cannot sync folders ({errno.errorcode[code]}, fsync): "
        "a save that has returned may be undone by a power cut, but not mixed with another. "
        "With sync_files=False a save waits for no sync at all, and does not say this.",
    )


def _close(fd: int, path: Path) -> None:
    try:
        os.close(fd)
    except OSError as error:
        name_file(error, path)
        raise


def _open_inside(folder: Path, name: str, *, follow_links: bool) -> int:
    """A descriptor of a file inside the folder; any other kind of entry counts as damage."""
    # Without O_NONBLOCK a FIFO of that name would block the opening for ever.
    flags = operating_system.READ
    path = os.path.join(folder, name)
    try:
        if operating_system.is_plain_entry(folder, name):
            # An entry of the folder itself that is not a link cannot be elsewhere.
            try:
                return os.open(path, flags | operating_system.NO_LINK)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        root, real = os.path.realpath(folder), os.path.realpath(path)
        if os.path.commonpath((root, real)) == root:
            return os.open(path, flags)
        _check_way_out(name, real, follow_links=follow_links)
        # O_NOCTTY: if another file has replaced it, it must not become this process's terminal.
        return os.open(real, flags | operating_system.NO_LINK | operating_system.NO_TERMINAL)
    except ValueError as error:
        raise CheckpointCorruptError(f"no name of a file: {error}", file=repr(name)) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            if os.path.isfile(folder):
                text = f"{folder} is a file, and no folder of a checkpoint"
            else:
                text = f"no plain file: {error.strerror}"
            raise CheckpointCorruptError(text, file=name) from error
        raise


def _open_shared(folder: Path, name: str, own: str, *, follow_links: bool) -> int:
    """A descriptor of a file that the steps of a run share, in the folder beside theirs."""
    beside = Path(os.path.realpath(folder)).parent / SHARED_FOLDER
    if beside.is_symlink() and not follow_links:
        raise CheckpointCorruptError(
            f"{beside} is a link, and no folder of shared files", file=name
        )
    try:
        return _open_inside(beside, own, follow_links=follow_links)
    except FileNotFoundError as error:
        raise missing_file(name, beside / own) from error


def _check_way_out(name: str, real: str, *, follow_links: bool) -> None:
    """Raise CheckpointCorruptError unless this name may be the file `real`, outside of the folder.

    A device or a FIFO is not even opened, since opening it can have effects.
    """
    climbs = os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir
    if climbs or not follow_links:
        raise CheckpointCorruptError(
            f"{'the name' if climbs else 'a link'} leads out of the checkpoint's folder"
            + ("" if climbs else f", to {real}: FileSystemReader(folder, follow_links=True) reads "
               "it, if you trust the maker of the link"),
            file=name,
        )  # fmt: skip
    status = os.stat(real, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or kind_of(status) in UNREAL_KINDS:
        raise CheckpointCorruptError(f"a link leads to {real}, which is no plain file", file=name)


def _lock(fd: int, folder: Path) -> None:
    """Take the advisory lock of an open folder, in bounded time. Closing the descriptor releases
    it.

    On the folder itself (flock(2)), so that no lock file is left among the checkpoint's.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            # Some network file systems cannot lock folders; there a commit is as safe as a rename.
            operating_system.lock_file(fd, shared=False)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"another save has been committing to {folder} for {LOCK_S:.0f} s"
                ) from None
            time.sleep(0.02)
        else:
            return
