"""Open files of the local disk, and what kind of file system they are on.

A file is written from its start to its end, or read by position; errors name the file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.io.disk import Buffer
from pytest_dcp._engine.io.mapped_windows import IOV_MAX, Windows

RESERVE_FROM_BYTES = 1 << 20
"""Smaller files are written in one call anyway."""
EARLY_BYTES = 8 << 20
"""Written to the medium at a time, before the file is whole. In 4 MiB, and in 16 to 32, a save of
56 MB by each of four ranks took as long or longer."""
UNWRITTEN_BYTES = 64 << 20
"""The most bytes of a file that wait for the medium, and the `EARLY_BYTES` that come next."""
MEMORY_KINDS = ("tmpfs", "ramfs")
"""File systems that fill a reserved page with zeros, so that it is written twice."""
MAPPED_KINDS = ("ext3", "ext4", "xfs", "f2fs")
"""Local disk file systems, where no other machine can remove a file while it is mapped."""


def name_file(error: OSError, path: Any) -> None:
    """Add the file's name to errors of its descriptor."""
    if error.errno is not None and error.filename is None and path is not None:
        error.filename = os.fspath(path)


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


def kind_of(status: os.stat_result) -> str | None:
    numbers = operating_system.device_numbers(status.st_dev)
    return None if numbers is None else kind_of_device(*numbers)


class LocalOut:
    """A file descriptor that is written to. Its errors name the file."""

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self.fd = fd
        self.path = path
        self._written_bytes = 0
        self._begun_bytes = 0
        """On their way to the medium, or there."""
        self._writes_early = True

    def write(self, buffers: Sequence[Buffer]) -> None:
        try:
            for start in range(0, len(buffers), IOV_MAX):
                self._write_all(list(buffers[start : start + IOV_MAX]))
        except OSError as error:
            name_file(error, self.path)
            raise

    def reserve(self, nbytes: int) -> None:
        if nbytes < RESERVE_FROM_BYTES:
            return
        if kind_of(os.fstat(self.fd)) in MEMORY_KINDS:
            return
        try:
            operating_system.reserve(self.fd, nbytes)
        except OSError as error:
            name_file(error, self.path)
            raise

    def begin_sync(self) -> None:
        try:
            while self._writes_early and self._written_bytes - self._begun_bytes >= EARLY_BYTES:
                self._write_next_early()
        except OSError as error:
            name_file(error, self.path)
            raise

    def _write_next_early(self) -> None:
        start = self._begun_bytes
        self._writes_early = operating_system.write_early(self.fd, start, EARLY_BYTES, wait=False)
        self._begun_bytes += EARLY_BYTES
        old = start - UNWRITTEN_BYTES
        if self._writes_early and old >= 0:
            operating_system.write_early(self.fd, old, EARLY_BYTES, wait=True)

    def end_at(self, nbytes: int) -> None:
        try:
            if os.fstat(self.fd).st_size > nbytes:
                os.ftruncate(self.fd, nbytes)
        except OSError as error:
            name_file(error, self.path)
            raise

    def sync(self) -> None:
        try:
            operating_system.sync_file(self.fd)
        except OSError as error:
            name_file(error, self.path)
            raise

    def _write_all(self, buffers: list[Buffer]) -> None:
        remaining_bytes = sum(map(len, buffers))
        while remaining_bytes:
            written_bytes = operating_system.write_call()(self.fd, buffers)
            if not written_bytes:
                raise OSError(errno.EIO, "a write took no byte, and gave no reason")
            remaining_bytes -= written_bytes
            self._written_bytes += written_bytes
            if remaining_bytes:
                buffers = _drop_first_bytes(buffers, written_bytes)


class LocalIn:
    """A file descriptor that is read from, by position. Its errors name the file."""

    request_bytes = 0

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

        Not st_blocks, which file systems with compression or delayed writing count differently.
        """
        if not hasattr(os, "SEEK_DATA"):
            return self.size
        stored = end = 0
        while end < self.size:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
                end = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as error:
                # ENXIO: no data after this offset. Others: the file system lacks this call.
                return stored if error.errno == errno.ENXIO else self.size
            stored += end - start
        return stored

    def read_into(self, offset: int, view: memoryview) -> int:
        try:
            preadv = operating_system.read_call()
            read_bytes = preadv(self.fd, (view,), offset)
            while read_bytes < len(view):
                more = preadv(self.fd, (view[read_bytes:],), offset + read_bytes)
                if not more:
                    break
                read_bytes += more
        except OSError as error:
            name_file(error, self.path)
            raise
        return read_bytes

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        # One system call for each row, without an interpreter step in between.
        try:
            read_counts = list(
                map(operating_system.read_call(), repeat(self.fd), zip(views), offsets)
            )
        except OSError as error:
            name_file(error, self.path)
            raise
        view_lengths = list(map(len, views))
        if read_counts == view_lengths:
            return sum(read_counts)
        return sum(map(self.read_into, offsets, views))

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        return self._windows.window(offset, nbytes) if self.maps else None

    def again(self) -> LocalIn:
        """The same open file for another thread; valid as long as this one."""
        again = LocalIn(self.fd, self.size, path=self.path)
        again.maps = self.maps
        return again

    def close(self) -> None:
        """Close everything opened in addition to the file; the owner closes the descriptor."""
        self._windows.close()


def _drop_first_bytes(buffers: Sequence[Buffer], skipped_bytes: int) -> list[Buffer]:
    """The buffers without their first `skipped_bytes` bytes."""
    for n, buffer in enumerate(buffers):
        if skipped_bytes < len(buffer):
            return [memoryview(buffer)[skipped_bytes:], *buffers[n + 1 :]]
        skipped_bytes -= len(buffer)
    return []
