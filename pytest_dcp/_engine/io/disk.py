"""Files, as the engine needs them: a contract, and the local disk.

Everything that the engine does to storage goes through a `Disk`, so that one place decides how an
operation is made, and faults can be put between.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

from pytest_dcp._engine.io.lease import hold_lease, wait_for_leases
from pytest_dcp._engine.io.mapped_windows import IOV_MAX, Windows
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

RESERVE_FROM_BYTES = 1 << 20
"""Smaller files are written at once anyway."""
LOCK_S = 120.0
"""How long a commit waits for another save's: they take milliseconds."""
MEMORY_KINDS = ("tmpfs", "ramfs")
"""File systems that fill a reserved page with zeros, to be written a second time."""

CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS)
"""How a file system (of SMB or 9p mounts, some in user space) says that folders have no fsync."""

MAPPED_KINDS = ("ext3", "ext4", "xfs", "f2fs")
"""Local disk file systems, where no other machine can take a file away from under a mapping."""

UNREAL_KINDS = frozenset(
    ("proc", "sysfs", "debugfs", "tracefs", "securityfs", "configfs", "cgroup", "cgroup2", "bpf")
)
"""File systems whose files are made up by the kernel when they are read: no link may lead there."""

Buffer = bytes | bytearray | memoryview


class Out(Protocol):
    """A new file, written from its start to its end."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers, all of them."""

    def reserve(self, nbytes: int) -> None:
        """Say how long the file will be at least: an early error when there is no room, and space
        in one piece, where the storage can do that."""

    def end_at(self, nbytes: int) -> None:
        """Say that the file is so long, whatever was reserved."""

    def sync(self) -> None:
        """Return once the bytes so far are on stable storage."""


class In(Protocol):
    """A file that is there."""

    size: int
    maps: bool
    """Whether `window` is worth asking."""

    @property
    def stored_bytes(self) -> int:
        """What it occupies where it is kept: less than `size` if it is sparse."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view from the offset; fewer bytes than asked only at the end of the file.

        Safe to call from several threads.
        """

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        """Fill each view from its offset; the bytes read, fewer than asked only if the file ends.

        Safe to call from several threads.
        """

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        """These bytes as memory, to be dropped soon; None where that does not go. For one thread.

        For files that are not cut short while they are read: see `io.mapped_windows`.
        """


class Disk(Protocol):
    """Where checkpoints are kept."""

    renames: bool
    """Whether `replace` is done at one instant. Where not, a file appears whole when it is closed,
    if it is no longer than metadata are."""

    def make_folder(self, folder: Any) -> Sequence[Any]:
        """Make the folder and those above it; nothing where it exists.

        The folders to sync before its name and those of new ones above it last, the innermost
        first. The first is given for a folder that exists, too: who made it may not have synced it.
        """

    def names(self, folder: Any) -> list[str]:
        """Names of the folder's entries; none where there is no folder."""

    def exists(self, folder: Any, name: str) -> bool:
        """Whether the folder has a file of this name."""

    def create(self, folder: Any, name: str) -> AbstractContextManager[Out]:
        """A new file of this name. An existing one is replaced."""

    def open(self, folder: Any, name: str) -> AbstractContextManager[In]:
        """The file of this name, to read.

        Raises FileNotFoundError, and CheckpointCorruptError for what is no plain file inside.
        """

    def replace(self, folder: Any, old: str, new: str) -> None:
        """Rename a file. An open of `new` finds the old file or the new one, never none."""

    def remove(self, folder: Any, name: str) -> None:
        """Remove a file; nothing where it is gone."""

    def sync_folder(self, folder: Any) -> None:
        """Return once the folder's names are on stable storage."""

    def locked(self, folder: Any) -> AbstractContextManager[None]:
        """Keep other saves' commits out of the folder, where the storage has a way to."""

    def leased(self, folder: Any, name: str) -> AbstractContextManager[None]:
        """Keep a commit from replacing this file, for a while, where the storage has a way to."""

    def between_leases(self, folder: Any, name: str) -> AbstractContextManager[None]:
        """Replace this file inside: its readers have let go, or were given their time."""


class LocalDisk:
    """The local disk, by file descriptors."""

    renames = True
    follow_links = False

    def __init__(self, *, follow_links: bool = False) -> None:
        """follow_links: whether a link in a folder may lead out of it, to a plain file.

        A name may not, either way: it is the checkpoint's word, and a link that of the one who made
        the folder.
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

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        path = Path(folder) / name
        fd = os.open(path, flags, 0o666)
        try:
            yield LocalOut(fd, path)
        finally:
            _close(fd, path)

    @contextlib.contextmanager
    def open(self, folder: Path, name: str) -> Iterator[In]:
        fd = _open_inside(folder, name, follow_links=self.follow_links)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointCorruptError("not a plain file", file=name)
            file = LocalIn(fd, status.st_size, _kind_of(status), Path(folder) / name)
            try:
                yield file
            finally:
                file.close()
        finally:
            os.close(fd)

    def replace(self, folder: Path, old: str, new: str) -> None:
        (Path(folder) / old).replace(Path(folder) / new)

    def remove(self, folder: Path, name: str) -> None:
        (Path(folder) / name).unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
def _warn_of_unsynced(device: int, folder: Path, code: int) -> None:
    """Say once of each folder that its file system cannot do what is promised elsewhere."""
    warnings.warn(
        f"{folder} is on a file system that cannot sync folders ({errno.errorcode[code]}, fsync): "
        "a save that has returned may be undone by a power cut, but not mixed with another. "
        "With sync_files=False a save waits for no sync at all, and does not say this.",
        stacklevel=2,
    )


def name_file(error: OSError, path: Any) -> None:
    """Have the error of a descriptor say which file it is about."""
    if error.errno is not None and error.filename is None and path is not None:
        error.filename = os.fspath(path)


def _close(fd: int, path: Path) -> None:
    try:
        os.close(fd)
    except OSError as error:
        name_file(error, path)
        raise


def _open_inside(folder: Path, name: str, *, follow_links: bool) -> int:
    """A descriptor of a file inside the folder; what no checkpoint would name is damage."""
    # Without O_NONBLOCK a FIFO of that name would block the opening for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    path = os.path.join(folder, name)
    try:
        if os.sep not in name and name not in ("", ".", ".."):
            # What is in the folder itself, and no link, cannot be elsewhere.
            try:
                return os.open(path, flags | os.O_NOFOLLOW)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        root, real = os.path.realpath(folder), os.path.realpath(path)
        if os.path.commonpath((root, real)) == root:
            return os.open(path, flags)
        _check_way_out(name, real, follow_links=follow_links)
        # O_NOCTTY: should another file be there by now, it must not become this process's terminal.
        return os.open(real, flags | os.O_NOFOLLOW | os.O_NOCTTY)
    except ValueError as error:
        raise CheckpointCorruptError(f"no name of a file: {error}", file=repr(name)) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise CheckpointCorruptError(f"no plain file: {error.strerror}", file=name) from error
        raise


def _check_way_out(name: str, real: str, *, follow_links: bool) -> None:
    """Raise CheckpointCorruptError unless this name may be the file `real`, outside of the folder.

    A device or a FIFO is not even opened: that alone can do something.
    """
    climbs = os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir
    if climbs or not follow_links:
        raise CheckpointCorruptError(
            f"{'the name' if climbs else 'a link'} leads out of the checkpoint's folder"
            + ("" if climbs else f", to {real}: FileSystemReader(folder, follow_links=True) reads "
               "it, if you trust whoever made the link"),
            file=name,
        )  # fmt: skip
    status = os.stat(real, follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or _kind_of(status) in UNREAL_KINDS:
        raise CheckpointCorruptError(f"a link leads to {real}, which is no plain file", file=name)


def _lock(fd: int, folder: Path) -> None:
    """Take the advisory lock of an open folder, in bounded time. It goes with the descriptor.

    On the folder itself (flock(2)), so that no lock file is left among the checkpoint's.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"another save has been committing to {folder} for {LOCK_S:.0f} s"
                ) from None
            time.sleep(0.02)
        except OSError:
            # Some network file systems lock no folders; then commits are as safe as a rename is.
            return
        else:
            return


@lru_cache(maxsize=64)
def kind_of_device(major: int, minor: int) -> str | None:
    """The file system of a mounted device, `tmpfs` for instance; None where it is unknown.

    From /proc/self/mountinfo (proc_pid_mountinfo(5)).
    """
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for fields in map(str.split, lines):
        if fields[2] == f"{major}:{minor}":
            return fields[fields.index("-") + 1]
    return None


def _kind_of(status: os.stat_result) -> str | None:
    return kind_of_device(os.major(status.st_dev), os.minor(status.st_dev))


class LocalOut:
    """A file descriptor that is written to. Its errors name the file."""

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self.fd = fd
        self.path = path

    def write(self, buffers: Sequence[Buffer]) -> None:
        try:
            for start in range(0, len(buffers), IOV_MAX):
                self._write_all(list(buffers[start : start + IOV_MAX]))
        except OSError as error:
            name_file(error, self.path)
            raise

    def reserve(self, nbytes: int) -> None:
        if nbytes < RESERVE_FROM_BYTES or not hasattr(os, "posix_fallocate"):
            return
        if _kind_of(os.fstat(self.fd)) in MEMORY_KINDS:
            return
        try:
            os.posix_fallocate(self.fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
                name_file(error, self.path)
                raise

    def end_at(self, nbytes: int) -> None:
        try:
            if os.fstat(self.fd).st_size > nbytes:
                os.ftruncate(self.fd, nbytes)
        except OSError as error:
            name_file(error, self.path)
            raise

    def sync(self) -> None:
        try:
            os.fsync(self.fd)
        except OSError as error:
            name_file(error, self.path)
            raise

    def _write_all(self, buffers: list[Buffer]) -> None:
        left = sum(map(len, buffers))
        while left:
            done = os.writev(self.fd, buffers)
            if not done:
                raise OSError(errno.EIO, "a write took no byte, and gave no reason")
            left -= done
            if left:
                buffers = _after(buffers, done)


class LocalIn:
    """A file descriptor that is read from, by position. Its errors name the file."""

    def __init__(
        self, fd: int, size: int, kind: str | None = None, path: Path | None = None
    ) -> None:
        self.fd = fd
        self.path = path
        self.size = size
        self.maps = kind in MAPPED_KINDS
        self._windows = Windows(fd, size)

    @property
    def stored_bytes(self) -> int:
        """The size without its holes (lseek(2), SEEK_HOLE).

        Not st_blocks, which file systems that compress, or write late, count otherwise.
        """
        if not hasattr(os, "SEEK_DATA"):
            return self.size
        stored = end = 0
        while end < self.size:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
                end = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                # ENXIO: no data behind this place. Others: the file system has no such call.
                return stored if error.errno == errno.ENXIO else self.size
            stored += end - start
        return stored

    def read_into(self, offset: int, view: memoryview) -> int:
        try:
            done = os.preadv(self.fd, (view,), offset)
            while done < len(view):
                more = os.preadv(self.fd, (view[done:],), offset + done)
                if not more:
                    break
                done += more
        except OSError as error:
            name_file(error, self.path)
            raise
        return done

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        # One call of the system for each row, without a step of the interpreter between them.
        try:
            done = list(map(os.preadv, repeat(self.fd), zip(views), offsets))
        except OSError as error:
            name_file(error, self.path)
            raise
        asked = list(map(len, views))
        if done == asked:
            return sum(done)
        return sum(map(self.read_into, offsets, views))

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        return self._windows.window(offset, nbytes) if self.maps else None

    def again(self) -> LocalIn:
        """The same open file, for one more thread; valid as long as this one is."""
        again = LocalIn(self.fd, self.size, path=self.path)
        again.maps = self.maps
        return again

    def close(self) -> None:
        """Give back what was opened beside the file; the descriptor is its owner's."""
        self._windows.close()


def _after(buffers: Sequence[Buffer], done: int) -> list[Buffer]:
    """The buffers without their first `done` bytes."""
    for n, buffer in enumerate(buffers):
        if done < len(buffer):
            return [memoryview(buffer)[done:], *buffers[n + 1 :]]
        done -= len(buffer)
    return []
