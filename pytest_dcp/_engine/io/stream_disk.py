"""Any `FileSystemBase` of torch as the engine's `Disk`, through its streams."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import FileSystemBase

from pytest_dcp._engine.io.disk import Buffer, In, Out
from pytest_dcp._engine.io.local_file import name_file


class StreamDisk:
    """Any `FileSystemBase` of torch, through its streams."""

    renames = True

    def __init__(self, fs: FileSystemBase) -> None:
        self.fs = fs

    def make_folder(self, folder: Any) -> tuple[()]:
        self.fs.mkdir(folder)
        return ()

    def names(self, folder: Any) -> list[str]:
        listing = getattr(self.fs, "ls", None)
        if listing is None or not self.fs.exists(folder):
            return []
        return sorted(os.path.basename(str(path).rstrip("/")) for path in listing(folder))

    def exists(self, folder: Any, name: str) -> bool:
        return self.fs.exists(self.fs.concat_path(folder, name))

    @contextlib.contextmanager
    def create(self, folder: Any, name: str) -> Iterator[Out]:
        path = self.fs.concat_path(folder, name)
        with self.fs.create_stream(path, "wb") as stream:
            yield StreamOut(stream, path)

    @contextlib.contextmanager
    def open(self, folder: Any, name: str) -> Iterator[In]:
        with self.fs.create_stream(self.fs.concat_path(folder, name), "rb") as stream:
            yield StreamIn(stream)

    def replace(self, folder: Any, old: str, new: str) -> None:
        self.fs.rename(self.fs.concat_path(folder, old), self.fs.concat_path(folder, new))

    def remove(self, folder: Any, name: str) -> None:
        path = self.fs.concat_path(folder, name)
        if self.fs.exists(path):
            self.fs.rm_file(path)

    def sync_folder(self, folder: Any) -> None:
        """Does nothing: such a file system has no call for it."""

    @contextlib.contextmanager
    def locked(self, folder: Any) -> Iterator[None]:
        yield

    def leased(self, folder: Any, name: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def between_leases(self, folder: Any, name: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class StreamOut:
    """A stream that is written to."""

    def __init__(self, stream: IO[bytes] | io.IOBase, path: Any = None) -> None:
        self.stream = stream
        self.path = path

    def write(self, buffers: Sequence[Buffer]) -> None:
        try:
            self._write_all(buffers)
        except OSError as error:
            name_file(error, self.path)
            raise

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            remaining = memoryview(buffer)
            while remaining:
                # A raw stream may write only a part; a buffered one writes all and may return None.
                written_bytes = self.stream.write(remaining)
                if written_bytes == 0:
                    raise OSError(errno.EIO, "a write took no byte, and gave no reason")
                remaining = remaining[len(remaining) if written_bytes is None else written_bytes :]

    def reserve(self, nbytes: int) -> None:
        """Does nothing: a stream has no call for it."""

    def begin_sync(self) -> None:
        """Does nothing: a stream has no call for it."""

    def end_at(self, nbytes: int) -> None:
        """Does nothing: the size is that of the bytes written."""

    def sync(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            name_file(error, self.path)
            raise
        try:
            os.fsync(self.stream.fileno())
        except (AttributeError, OSError) as error:
            # Streams without a descriptor (object stores) are durable when they are closed.
            if isinstance(error, OSError) and error.errno is not None:
                name_file(error, self.path)
                raise


class StreamIn:
    """A seekable stream that is read from, one reader at a time."""

    maps = False
    request_bytes = 1 << 20

    def __init__(self, stream: IO[bytes] | io.IOBase) -> None:
        self.stream = stream
        self.lock = threading.Lock()
        self.size = self.stored_bytes = stream.seek(0, os.SEEK_END)

    def read_into(self, offset: int, view: memoryview) -> int:
        with self.lock:
            self.stream.seek(offset)
            read_bytes = 0
            while read_bytes < len(view):
                data = self.stream.read(len(view) - read_bytes)
                if not data:
                    break
                view[read_bytes : read_bytes + len(data)] = data
                read_bytes += len(data)
        return read_bytes

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        return sum(map(self.read_into, offsets, views))

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        return None
