"""Stand-ins for the functions of `os` that touch storage.

Each has the name, arguments and result of the original. For a path or descriptor below no watched
root it calls the original; else `Registry.perform` does the operation. The functions that copy
inside the kernel (sendfile, copy_file_range) are done as reads and writes, so that both sides are
seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pytest_dcp.faults.tap.operation import Operation, OperationKind
from pytest_dcp.faults.tap.watches import REGISTRY, Descriptor

REPLACED = (
    "open", "close", "read", "pread", "readv", "preadv", "write", "pwrite", "writev", "pwritev",
    "fsync", "fdatasync", "ftruncate", "truncate", "posix_fallocate", "dup", "dup2", "sendfile",
    "copy_file_range", "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir",
    "scandir", "listdir",
)  # fmt: skip
"""Functions of `os`; makedirs, renames and others call them by name. Functions that a platform
lacks are left out.
"""

real: Any = SimpleNamespace(**{name: getattr(os, name) for name in REPLACED if hasattr(os, name)})
"""The original functions."""


def _perform(operation: Operation, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return REGISTRY.perform(operation, lambda op: (function(*args, **kwargs), op.nbytes))


def _operation_on(kind: OperationKind, descriptor: Descriptor, **facts: Any) -> Operation:
    return Operation(kind, descriptor.path, handle=descriptor.handle, **facts)


# ---- descriptors


def open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    place = REGISTRY.place(path, dir_fd)
    if place is None:
        return int(real.open(path, flags, mode, dir_fd=dir_fd))
    makes = flags & os.O_TRUNC or (flags & os.O_CREAT and not os.path.exists(place))
    handle = REGISTRY.new_handle()

    def opened() -> int:
        fd: int = real.open(path, flags, mode, dir_fd=dir_fd)
        REGISTRY.add_descriptor(fd, place, handle, appends=bool(flags & os.O_APPEND))
        return fd

    fd: int = _perform(Operation("create" if makes else "open", place, handle=handle), opened)
    return fd


def close(fd: int) -> Any:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return real.close(fd)
    return close_descriptor(fd, descriptor, lambda: real.close(fd))


def close_descriptor(fd: int, descriptor: Descriptor, act: Callable[[], None]) -> Any:
    """Close a tracked descriptor by calling `act`."""

    def drop_and_close() -> None:
        REGISTRY.drop_descriptor(fd)  # before: the number may be another file's at once
        act()

    return _perform(_operation_on("close", descriptor), drop_and_close)


def dup(fd: int) -> int:
    copy: int = real.dup(fd)
    REGISTRY.copy_descriptor(fd, copy)
    return copy


def dup2(fd: int, fd2: int, inheritable: bool = True) -> int:
    copy: int = real.dup2(fd, fd2, inheritable)
    REGISTRY.copy_descriptor(fd, copy)
    return copy


# ---- bytes in


def read(fd: int, n: int) -> bytes:
    descriptor = REGISTRY.descriptor(fd)
    return real.read(fd, n) if descriptor is None else _read(fd, descriptor, n, None)


def pread(fd: int, n: int, offset: int) -> bytes:
    descriptor = REGISTRY.descriptor(fd)
    return real.pread(fd, n, offset) if descriptor is None else _read(fd, descriptor, n, offset)


def readv(fd: int, buffers: Sequence[Any]) -> int:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return int(real.readv(fd, buffers))
    return _scatter(_read(fd, descriptor, _total(buffers), None), buffers)


def preadv(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return int(real.preadv(fd, buffers, offset, flags))
    return _scatter(_read(fd, descriptor, _total(buffers), offset), buffers)


def _read(fd: int, descriptor: Descriptor, n: int, offset: int | None) -> bytes:
    """Read at the offset, or at the descriptor's position, which then moves."""

    def act(operation: Operation) -> tuple[bytes, int]:
        if offset is None:
            data = real.read(fd, operation.nbytes)
        else:
            data = real.pread(fd, operation.nbytes, offset)
        return data, len(data)

    at = os.lseek(fd, 0, os.SEEK_CUR) if offset is None else offset
    data: bytes = REGISTRY.perform(_operation_on("read", descriptor, offset=at, nbytes=n), act)
    return data


def _scatter(data: bytes, buffers: Sequence[Any]) -> int:
    rest = memoryview(data)
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        view[: len(rest)] = rest[: len(view)]
        rest = rest[len(view) :]
    return len(data)


def _total(buffers: Sequence[Any]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


# ---- bytes out


def write(fd: int, data: Any) -> int:
    descriptor = REGISTRY.descriptor(fd)
    return int(real.write(fd, data)) if descriptor is None else _write(fd, descriptor, [data], None)


def pwrite(fd: int, data: Any, offset: int) -> int:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return int(real.pwrite(fd, data, offset))
    return _write(fd, descriptor, [data], offset)


def writev(fd: int, buffers: Sequence[Any]) -> int:
    descriptor = REGISTRY.descriptor(fd)
    return (
        int(real.writev(fd, buffers))
        if descriptor is None
        else _write(fd, descriptor, buffers, None)
    )


def pwritev(fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return int(real.pwritev(fd, buffers, offset, flags))
    return _write(fd, descriptor, buffers, offset)


def _write(fd: int, descriptor: Descriptor, buffers: Sequence[Any], offset: int | None) -> int:
    """Write at the offset, or at the descriptor's position, which then moves. Returns the number of
    bytes.
    """
    data = b"".join(memoryview(buffer).tobytes() for buffer in buffers)
    own = offset is None

    def act(operation: Operation) -> tuple[int, int]:
        stored = operation.data or b""
        count = real.write(fd, stored) if own else real.pwrite(fd, stored, offset)
        return count, count

    if descriptor.appends:
        at = os.fstat(fd).st_size  # also of a pwrite: Linux appends whatever the offset says
    else:
        at = os.lseek(fd, 0, os.SEEK_CUR) if offset is None else offset
    operation = _operation_on("write", descriptor, offset=at, data=data, nbytes=len(data))
    claimed: int = REGISTRY.perform(operation, act)
    if own and not descriptor.appends:
        # A lost or shortened write has moved the offset all the same.
        os.lseek(fd, at + claimed, os.SEEK_SET)
    return claimed


def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int, *args: Any) -> int:
    if args or (REGISTRY.descriptor(out_fd) is None and REGISTRY.descriptor(in_fd) is None):
        return int(real.sendfile(out_fd, in_fd, offset, count, *args))
    return _copy_range(in_fd, out_fd, count, offset, None)


def copy_file_range(
    src: int, dst: int, count: int, offset_src: int | None = None, offset_dst: int | None = None
) -> int:
    if REGISTRY.descriptor(src) is None and REGISTRY.descriptor(dst) is None:
        return int(real.copy_file_range(src, dst, count, offset_src, offset_dst))
    return _copy_range(src, dst, count, offset_src, offset_dst)


def _copy_range(src: int, dst: int, count: int, start: int | None, to: int | None) -> int:
    at = os.lseek(src, 0, os.SEEK_CUR) if start is None else start
    data = pread(src, min(count, 1 << 20), at)
    nbytes = write(dst, data) if to is None else pwrite(dst, data, to)
    if start is None:
        os.lseek(src, at + nbytes, os.SEEK_SET)
    return nbytes


# ---- whole files


def fsync(fd: Any) -> Any:
    _sync(fd, real.fsync)


def fdatasync(fd: Any) -> Any:
    _sync(fd, real.fdatasync)


def _sync(fd: Any, function: Callable[[int], None]) -> Any:
    number = fd if isinstance(fd, int) else fd.fileno()
    descriptor = REGISTRY.descriptor(number)
    if descriptor is None:
        return function(number)
    return _perform(
        _operation_on("sync_folder" if descriptor.is_folder else "sync", descriptor),
        function,
        number,
    )


def ftruncate(fd: int, length: int) -> Any:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return real.ftruncate(fd, length)
    return _perform(
        _operation_on("truncate", descriptor, nbytes=length), real.ftruncate, fd, length
    )


def truncate(path: Any, length: int) -> Any:
    if isinstance(path, int):
        return ftruncate(path, length)
    if (place := REGISTRY.place(path)) is None:
        return real.truncate(path, length)
    return _perform(Operation("truncate", place, nbytes=length), real.truncate, path, length)


def posix_fallocate(fd: int, offset: int, length: int) -> Any:
    descriptor = REGISTRY.descriptor(fd)
    if descriptor is None:
        return real.posix_fallocate(fd, offset, length)
    operation = _operation_on("allocate", descriptor, offset=offset, nbytes=length)
    return _perform(operation, real.posix_fallocate, fd, offset, length)


# ---- names


def rename(
    src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
) -> None:
    _move(real.rename, src, dst, src_dir_fd, dst_dir_fd)


def replace(
    src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
) -> None:
    _move(real.replace, src, dst, src_dir_fd, dst_dir_fd)


def _move(
    function: Callable[..., None], src: Any, dst: Any, src_fd: int | None, dst_fd: int | None
) -> Any:
    def act() -> None:
        function(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
        REGISTRY.rename_paths(operation.path, str(operation.to))

    source, to = REGISTRY.place(src, src_fd), REGISTRY.place(dst, dst_fd)
    if source is None and to is None:
        return function(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
    operation = Operation("rename", source or os.path.realpath(src), to=to or os.path.realpath(dst))
    if source is None:
        operation = _add_file_bytes(operation)
    return _perform(operation, act)


def link(
    src: Any,
    dst: Any,
    *,
    src_dir_fd: int | None = None,
    dst_dir_fd: int | None = None,
    follow_symlinks: bool = True,
) -> Any:
    facts = {
        "src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd, "follow_symlinks": follow_symlinks
    }  # fmt: skip
    to, source = REGISTRY.place(dst, dst_dir_fd), REGISTRY.place(src, src_dir_fd)
    if to is None:
        return real.link(src, dst, **facts)
    operation = Operation("link", source or os.path.realpath(src), to=to)
    if source is None:
        operation = _add_file_bytes(operation)
    return _perform(operation, real.link, src, dst, **facts)


def _add_file_bytes(operation: Operation) -> Operation:
    """Add the bytes of a file that comes into the root, which no watcher saw being written."""
    path = Path(operation.path)
    data = path.read_bytes() if path.is_file() else None
    return Operation(operation.kind, operation.path, to=operation.to, data=data)


def symlink(
    src: Any, dst: Any, target_is_directory: bool = False, *, dir_fd: int | None = None
) -> Any:
    if (to := REGISTRY.place(dst, dir_fd)) is None:
        return real.symlink(src, dst, target_is_directory, dir_fd=dir_fd)
    operation = Operation("link", to, to=to, data=os.fsencode(src))
    return _perform(operation, real.symlink, src, dst, target_is_directory, dir_fd=dir_fd)


def unlink(path: Any, *, dir_fd: int | None = None) -> Any:
    _call_on_name("remove", real.unlink, path, dir_fd)


def remove(path: Any, *, dir_fd: int | None = None) -> Any:
    _call_on_name("remove", real.remove, path, dir_fd)


def rmdir(path: Any, *, dir_fd: int | None = None) -> Any:
    _call_on_name("remove_folder", real.rmdir, path, dir_fd)


def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> Any:
    _call_on_name("make_folder", real.mkdir, path, dir_fd, mode)


def _call_on_name(
    kind: OperationKind, function: Callable[..., None], path: Any, dir_fd: int | None, *args: Any
) -> Any:
    if (place := REGISTRY.place(path, dir_fd)) is None:
        return function(path, *args, dir_fd=dir_fd)
    return _perform(Operation(kind, place), function, path, *args, dir_fd=dir_fd)


def scandir(path: Any = ".") -> Any:
    return _list(real.scandir, path)


def listdir(path: Any = ".") -> Any:
    return _list(real.listdir, path)


def _list(function: Callable[[Any], Any], path: Any) -> Any:
    place = REGISTRY.place("." if path is None else path)
    return function(path) if place is None else _perform(Operation("list", place), function, path)
