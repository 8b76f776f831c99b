"""The calls that Linux, macOS and Windows do not share, and what the engine does without them.

Linux has them all. The engine's other modules import and run on every system, since they make
these calls only through here, or ask first whether they exist. What is lost without a call:

- flock, locks on folders (Windows): two saves that commit to one folder at the same moment are kept
  apart only by the atomic rename, as on network file systems without locks. A reader's lease is its
  open file, which Windows does not let anybody replace: the commit tries again for `BUSY_S`.
- fsync of a folder (Windows, where a folder cannot be opened): NTFS writes its journal in order, so
  a power cut may undo the last save, but not mix it with another.
- readv, writev and pread (Windows): a read moves the file's position, under a lock.
- poll (Windows): select, which takes any socket there.
- fork (Windows): no child process inherits connections, so nothing has to be forgotten.
- limits of open files (Windows): `WINDOWS_FILES`, the limit of its C library.
- posix_fallocate (macOS, Windows): a full disk shows at a write instead of before the first one.
- fsync that reaches the medium (macOS): F_FULLFSYNC, which macOS has instead.
- sync_file_range (macOS, Windows): a file's bytes wait in memory until its end, or until the system
  chooses to write them.

Calls are looked up when they are made: a recorder or a test may have replaced them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import select
else:
    import fcntl
    import resource
    import select

BINARY = getattr(os, "O_BINARY", 0)
"""Without it Windows would change line ends in the file."""
CLOSED_IN_CHILDREN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)
"""For a FIFO, which would block the opening for ever; Windows has none in folders."""
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
NO_TERMINAL = getattr(os, "O_NOCTTY", 0)
NEW_FILE = BINARY | CLOSED_IN_CHILDREN
READ = os.O_RDONLY | BINARY | CLOSED_IN_CHILDREN | WITHOUT_WAITING
BUSY_S = 10.0
"""How long a commit waits for readers of the file that it replaces, where there are no locks."""
BUSY_PAUSE_S = 0.02
WINDOWS_FILES = 8192
"""The largest number that _setmaxstdio takes."""
NO_SUCH_RESERVATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
NO_EARLY_WRITING = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ESPIPE)
WAIT_BEFORE, WRITE, WAIT_AFTER = 1, 2, 4
"""SYNC_FILE_RANGE_WAIT_BEFORE and others (sync_file_range(2))."""

_position = threading.Lock()
"""Held while a file's position is moved to read there."""


# Files.


def is_plain_entry(folder: Path, name: str) -> bool:
    """Whether the name is that of an entry of the folder itself, which can be opened as no link.

    Where opening cannot refuse a link, a link is no such entry.
    """
    if name in ("", ".", "..") or os.sep in name:
        return False
    if sys.platform == "win32" and (set(name) & {"/", "\\", ":"}):  # C:file, file:stream
        return False
    return bool(NO_LINK) or not os.path.islink(os.path.join(folder, name))


def read_call() -> Callable[[int, Sequence[Any], int], int]:
    """preadv(2): reads into buffers at an offset, and returns the number of bytes."""
    return getattr(os, "preadv", _read_at)


def write_call() -> Callable[[int, Sequence[Any]], int]:
    """writev(2): writes buffers one after the other, and returns the number of bytes."""
    return getattr(os, "writev", _write_first)


def _read_at(fd: int, buffers: Sequence[Any], offset: int) -> int:
    """Reads like preadv, which may return fewer bytes than asked for."""
    read_bytes = 0
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            data = os.read(fd, len(view))
            view[: len(data)] = data
            read_bytes += len(data)
            if len(data) < len(view):
                break
    return read_bytes


def _write_first(fd: int, buffers: Sequence[Any]) -> int:
    """Writes like writev, which may take fewer bytes than it was given."""
    first = next((one for one in buffers if len(one)), b"")
    return os.write(fd, first)


def reserve(fd: int, nbytes: int) -> None:
    """Allocate the file's first bytes, where the file system can."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in NO_SUCH_RESERVATION:
            raise


def sync_file(fd: int) -> None:
    """Return when the file's bytes are on the medium."""
    if sys.platform == "darwin":
        # fsync(2) of macOS leaves them in the drive's cache, where a power cut loses them.
        full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:
            with contextlib.suppress(OSError):  # a network file system has only fsync
                fcntl.fcntl(fd, full)
                return
    os.fsync(fd)


def write_early(fd: int, offset: int, nbytes: int, *, wait: bool) -> bool:
    """Begin to write these bytes of a file to its medium, or wait until they are written.

    False where the system or the file system cannot. It is no `sync_file`: the file's size and the
    drive's cache are left alone. Raises OSError if the medium refused the bytes: with `wait` only,
    and then a later `sync_file` need not report it again.
    """
    call = _sync_file_range()
    if call is None:
        return False
    flags = WAIT_BEFORE | WRITE | WAIT_AFTER if wait else WRITE
    if call(fd, offset, nbytes, flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EARLY_WRITING:
        return False
    raise OSError(code, os.strerror(code))


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call  # type: ignore[no-any-return]  # of the C library


def can_open_folders() -> bool:
    """Whether a folder has descriptors: for locks and fsync."""
    return hasattr(os, "O_DIRECTORY")


def open_folder(folder: Path) -> int:
    """A descriptor of a folder; only where folders have descriptors."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | CLOSED_IN_CHILDREN)


def lock_file(fd: int, *, shared: bool) -> bool:
    """Whether the open file or folder is locked now; False where there are no such locks.

    Never waits. Raises BlockingIOError while another has a lock that excludes this one.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False  # a file system without such locks
    return True


def open_files_hold_their_names() -> bool:
    """Whether an open file can be neither replaced nor removed."""
    return sys.platform == "win32"


def replace_file(old: Path, new: Path) -> None:
    """Rename over a file; where a reader's open file prevents it, wait for at most `BUSY_S`."""
    until_s = time.monotonic() + BUSY_S
    while True:
        try:
            old.replace(new)
        except PermissionError:
            if not open_files_hold_their_names() or time.monotonic() > until_s:
                raise
            time.sleep(BUSY_PAUSE_S)
        else:
            return


def remove_file(path: Path) -> None:
    """Remove a file if it exists; one that a reader holds on to stays for a later save."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        if not open_files_hold_their_names():
            raise


def device_numbers(device: int) -> tuple[int, int] | None:
    """The major and minor number of st_dev; None where devices have no such numbers."""
    if not hasattr(os, "major"):
        return None
    return os.major(device), os.minor(device)


# Descriptors.


def limits_of_open_files() -> tuple[int, int]:
    """How many descriptors this process may have, and how far it may raise that; -1: no limit."""
    if sys.platform == "win32":
        return WINDOWS_FILES, WINDOWS_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        -1 if soft == resource.RLIM_INFINITY else soft,
        -1 if hard == resource.RLIM_INFINITY else hard,
    )


def raise_limit_of_open_files(to: int) -> int:
    """The limit after the try to raise it."""
    if sys.platform != "win32":
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # not allowed in this process
            resource.setrlimit(resource.RLIMIT_NOFILE, (to, hard))
    return limits_of_open_files()[0]


def wait_for_socket(
    sock: socket.socket, timeout_s: float, *, to_read: bool, to_write: bool
) -> bool:
    """Whether the socket became ready before the timeout, or broke.

    Raises ValueError for a closed socket.
    """
    if hasattr(select, "poll"):
        poll = select.poll()
        events = (select.POLLIN if to_read else 0) | (select.POLLOUT if to_write else 0)
        poll.register(sock, events)
        return bool(poll.poll(timeout_s * 1000))
    readers, writers = [sock] if to_read else [], [sock] if to_write else []
    # Windows reports a failed connect only as an exceptional condition.
    return any(select.select(readers, writers, [sock], timeout_s))


def send_pieces(sock: socket.socket, pieces: list[Any]) -> int:
    """Send buffers one after the other; the number of bytes that the socket took."""
    if hasattr(sock, "sendmsg"):
        return sock.sendmsg(pieces)
    return sock.send(pieces[0])


# Processes.


def call_in_forked_children(forget: Callable[[], object]) -> None:
    """Call the function in every child that this process forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


def process_exists(pid: int) -> bool:
    """Whether a process of this machine has the pid; True where that cannot be asked."""
    if sys.platform == "win32":
        return True  # os.kill would end the process there, whatever the signal
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def user_id() -> int:
    """The user whose processes this one sees; 0 where users have no numbers."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_saver_processes() -> bool:
    """Whether a save can run in a process that shares memory and ends with its parent."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")
