"""Any file system of fsspec as the engine's `Disk`: object stores above all.

Every operation is one or a few requests to a store that may be far away, so files are read by
ranges, small files are put in one piece, and ranges near each other are fetched together. A store's
listing may be out of date, so a name missing from a listing proves nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_dcp._engine.format.shared_names import SHARED_FOLDER, missing_file, own_name
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.disk import Buffer, In, Out
from pytest_dcp._engine.io.stream_disk import StreamOut
from pytest_dcp.errors import CheckpointCorruptError

ONE_PUT_BYTES = 16 << 20
"""Data files up to this size are put in one request. Longer ones are held in memory up to this
size, then sent as a stream."""
NEAR = frozenset(("file", "local", "memory"))
"""Protocols of fsspec that use no network."""
GET_BYTES = 32 << 20
"""Bytes requested at a time: bounds the memory used besides the target."""
REQUEST_BYTES = 8 << 20
"""Checked ranges are read in requests of this size: a round trip's worth of bytes is a small part
of it."""
GAP_BYTES = 256 << 10
"""Up to this many unwanted bytes are fetched if that saves a request: a round trip's worth."""


class ObjectDisk:
    """A file system of fsspec."""

    def __init__(self, fs: Any, path_of: Mapping[str, str]) -> None:
        """path_of: gives the file system's own path of a folder, if that is not its URL."""
        self.fs = fs
        self.path_of = path_of
        self.renames = renames(fs)

    def is_remote(self, folder: str) -> bool:
        """Whether the file system is neither this process's memory nor a local disk."""
        own: Any = self.fs.protocol
        return NEAR.isdisjoint((own,) if isinstance(own, str) else own)

    def make_folder(self, folder: str) -> tuple[()]:
        # In a store without folders this does nothing, or creates the bucket.
        self.fs.makedirs(self._folder(folder), exist_ok=True)
        return ()

    def names(self, folder: str) -> list[str]:
        self._look_anew(self._folder(folder))
        try:
            entries = self.fs.ls(self._folder(folder), detail=True)
        except FileNotFoundError:
            return []
        files = [str(entry["name"]) for entry in entries if entry["type"] != "directory"]
        return sorted(name.rstrip("/").rpartition("/")[2] for name in files)

    def exists(self, folder: str, name: str) -> bool:
        path = self._path(folder, name)
        self._look_anew(path.rpartition("/")[0])
        return is_there(self.fs, path)

    @contextlib.contextmanager
    def create(self, folder: str, name: str) -> Iterator[Out]:
        # Metadata must replace the old file atomically, so they are never sent as a stream.
        limit = None if name.endswith(METADATA) else ONE_PUT_BYTES
        out = ObjectOut(self.fs, self._path(folder, name), limit)
        try:
            yield out
        except BaseException:
            out.give_up()
            raise
        out.put()

    @contextlib.contextmanager
    def open(self, folder: str, name: str) -> Iterator[In]:
        path = self._path(folder, name)
        if name.endswith(METADATA):
            # The only kind of file that another save replaces: read in one request, it is one
            # save's.
            yield MemoryIn(self.fs.cat_file(path))
            return
        self._look_anew(path.rpartition("/")[0])
        try:
            file = ObjectIn(self.fs, path)
        except FileNotFoundError as error:
            if own_name(name) is None:
                raise
            raise missing_file(name, path) from error
        yield file

    def replace(self, folder: str, old: str, new: str) -> None:
        old_path, new_path = self._path(folder, old), self._path(folder, new)
        if self.renames:
            self.fs.mv(old_path, new_path)
            return
        # Not by fsspec's own `mv`, which takes brackets and stars in names for patterns.
        self.fs.cp_file(old_path, new_path)
        self.fs.rm_file(old_path)

    def remove(self, folder: str, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(folder, name))

    def sync_folder(self, folder: str) -> None:
        """Does nothing: an object that a store has accepted is durable."""

    @contextlib.contextmanager
    def locked(self, folder: str) -> Iterator[None]:
        """Does nothing: a store has no locks. Users must avoid two saves to a folder at once."""
        yield

    def leased(self, folder: Any, name: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def between_leases(self, folder: Any, name: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def _folder(self, folder: str) -> str:
        return self.path_of.get(folder, folder).rstrip("/")

    def _path(self, folder: str, name: str) -> str:
        own, path = own_name(name), self._folder(folder)
        if own is None:
            return f"{path}/{name}"
        # A store takes ".." literally.
        run, slash, _ = path.rpartition("/")
        if not slash:
            raise CheckpointCorruptError(
                f"the files that steps of a run share are beside a step's folder, and {path} has "
                "nothing beside it",
                file=name,
            )
        return f"{run}/{SHARED_FOLDER}/{own}"

    def _look_anew(self, path: str) -> None:
        self.fs.invalidate_cache(path)


def is_there(fs: Any, path: str) -> bool:
    """Whether there is a file of this path; raises the error of a request that is refused."""
    return type_of_entry(fs, path) is not None


def type_of_entry(fs: Any, path: str) -> str | None:
    """ "file" or "directory"; None if nothing is there.

    fsspec's own `exists` and `isfile` answer False to any error, unless a file system has its own:
    then a refused request would let a save overwrite a checkpoint.
    """
    try:
        found: str = fs.info(path).get("type", "file")
    except FileNotFoundError:
        return None
    return found


def renames(fs: Any) -> bool:
    """Whether the file system can rename; fsspec's default is to copy and remove."""
    from fsspec import AbstractFileSystem

    return type(fs).mv is not AbstractFileSystem.mv


class ObjectOut:
    """A new file: put whole when it is closed, or sent as a stream once it is long."""

    def __init__(self, fs: Any, path: str, limit_bytes: int | None) -> None:
        """limit_bytes: bytes to hold before sending as a stream; None: hold everything."""
        self.fs = fs
        self.path = path
        self._limit_bytes = limit_bytes
        self._buffers: list[bytes] = []
        self._nbytes = 0
        self._stream: Any = None

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._stream is None:
            # The caller may use its memory again.
            self._buffers += map(bytes, buffers)
            self._nbytes += sum(map(len, buffers))
            if self._limit_bytes is None or self._nbytes <= self._limit_bytes:
                return
            self._stream = self.fs.open(self.path, "wb")
            buffers, self._buffers = self._buffers, []
        StreamOut(self._stream).write(buffers)

    def reserve(self, nbytes: int) -> None:
        """Does nothing: a store has no call for it."""

    def begin_sync(self) -> None:
        """Does nothing: a store has no call for it."""

    def end_at(self, nbytes: int) -> None:
        """Does nothing: the size is that of the bytes written."""

    def sync(self) -> None:
        """Does nothing: the file is durable once it is put."""

    def put(self) -> None:
        """Make the file; returns once the store has it."""
        if self._stream is None:
            self.fs.pipe_file(self.path, b"".join(self._buffers))
        else:
            self._stream.close()

    def give_up(self) -> None:
        """Remove the file if possible; nothing names it anyway."""
        if self._stream is None:
            return
        with contextlib.suppress(OSError, NotImplementedError):
            self._stream.discard()
        with contextlib.suppress(AttributeError):
            # Its finalizer would complete the upload.
            self._stream.closed = True
        with contextlib.suppress(OSError, NotImplementedError):
            self.fs.rm_file(self.path)


class ObjectIn:
    """A file that is read by ranges, each a request."""

    maps = True
    """One window is one request for all ranges near each other."""
    request_bytes = REQUEST_BYTES

    def __init__(self, fs: Any, path: str) -> None:
        self.fs = fs
        self.path = path
        self.size = self.stored_bytes = int(fs.info(path)["size"])
        self._lock = threading.Lock()
        self._end = 0
        """Where the last small read ended."""
        self._ahead = (0, b"")
        """The surplus of a fetch: its offset, its bytes."""

    def read_into(self, offset: int, view: memoryview) -> int:
        if len(view) <= GAP_BYTES:
            return self._read_small(offset, view)
        read_bytes = 0
        while read_bytes < len(view):
            data = self._get(offset + read_bytes, min(len(view) - read_bytes, GET_BYTES))
            if not data:
                break
            view[read_bytes : read_bytes + len(data)] = data
            read_bytes += len(data)
        return read_bytes

    def _read_small(self, offset: int, view: memoryview) -> int:
        """Like `read_into`; a second read near the last one also fetches the bytes after it."""
        with self._lock:
            near = 0 <= offset - self._end <= GAP_BYTES
            self._end = offset + len(view)
            start, data = self._ahead
            if not start <= offset <= self._end <= start + len(data):
                start, data = offset, self._get(offset, GAP_BYTES if near else len(view))
                self._ahead = start, data
        part = data[offset - start : offset - start + len(view)]
        view[: len(part)] = part
        return len(part)

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        read_bytes = 0
        for first, last, low, high in spans(offsets, [len(view) for view in views]):
            data = self._get(low, high - low)
            for offset, view in zip(offsets[first:last], views[first:last], strict=True):
                part = data[offset - low : offset - low + len(view)]
                view[: len(part)] = part
                read_bytes += len(part)
        return read_bytes

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        if offset + nbytes > self.size or not nbytes:
            return None
        data = self._get(offset, nbytes)
        return memoryview(bytearray(data)) if len(data) == nbytes else None

    def _get(self, offset: int, nbytes: int) -> bytes:
        # Some stores refuse a range that begins at the end.
        end = min(offset + nbytes, self.size)
        data: bytes = self.fs.cat_file(self.path, start=offset, end=end) if end > offset else b""
        return data


class MemoryIn:
    """A file that has been read."""

    maps = False
    request_bytes = 0

    def __init__(self, content: bytes) -> None:
        self.content = memoryview(content)
        self.size = self.stored_bytes = len(content)

    def read_into(self, offset: int, view: memoryview) -> int:
        part = self.content[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        return sum(map(self.read_into, offsets, views))

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        return None


def spans(offsets: Sequence[int], nbytes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Which rows to fetch together: first row, last (exclusive), first byte, last (exclusive).

    Rows ascend, and may overlap; a row that starts before its predecessor begins another fetch.
    Pure (no I/O).
    """
    first = low = end = 0
    for row, (offset, size) in enumerate(zip(offsets, nbytes, strict=True)):
        until = offset + size
        near = low <= offset <= end + GAP_BYTES and max(end, until) - low <= GET_BYTES
        if row and near:
            end = max(end, until)
            continue
        if row:
            yield first, row, low, end
        first, low, end = row, offset, until
    if offsets:
        yield first, len(offsets), low, end
