"""Stream transforms as attributes of a storage, where torch's storages have them.

A storage written for torch calls these, passes them to torch's `_write_item`, or replaces them by
its own objects.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import IO, Any, cast

from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from pytest_dcp._torch_internals.checkpoint_classes import (
    ExtensionRegistry,
    StreamTransformExtension,
)
from pytest_dcp._torch_internals.checkpoint_classes import _StorageWriterTransforms as _OF_TORCH


class StorageWriterTransforms:
    """Streams that an entry passes through on its way to a file."""

    def __init__(self, extensions: Sequence[StreamTransformExtension] | None = None) -> None:
        """extensions: the first one is called first; None: none."""
        self.extensions: Sequence[StreamTransformExtension] = tuple(extensions or ())

    def descriptors(self) -> list[str]:
        """Transforms that a reader must undo, in that order."""
        return [extension.get_descriptor() for extension in reversed(self.extensions)]

    def transform_save_stream(
        self, write_item: WriteItem, raw_stream: io.IOBase
    ) -> tuple[IO[bytes], list[str]]:
        """A stream to write the entry to, and the descriptors to record for it.

        Closing the stream ends the entry and leaves the raw stream open.
        """
        stream = cast(IO[bytes], _EndOfEntry(raw_stream))
        for extension in self.extensions:
            stream = extension.transform_to(stream)
        return stream, self.descriptors()


Through = Callable[[int, io.IOBase], tuple[IO[bytes], Sequence[str]]]
"""Takes the n-th item and the stream of its file; gives the stream for its entry and the
descriptors to record."""


def extensions_of(transforms: Any) -> Sequence[StreamTransformExtension]:
    """The extensions of a storage's `transforms`; empty if it transforms in its own way."""
    if has_own_way(transforms):
        return ()
    extensions: Sequence[StreamTransformExtension] = transforms.extensions
    return extensions


def has_own_way(transforms: Any) -> bool:
    """Whether a user's class writes entries to their file."""
    own = getattr(type(transforms), "transform_save_stream", None)
    defaults = (StorageWriterTransforms.transform_save_stream, _OF_TORCH.transform_save_stream)
    return own not in defaults


def own_way_of(transforms: Any, items: Sequence[WriteItem]) -> Through | None:
    """A function that asks a user's class for the stream of each item; None if there is no such
    class."""
    if not has_own_way(transforms):
        return None

    def through(row: int, raw: io.IOBase) -> tuple[IO[bytes], Sequence[str]]:
        stream, descriptors = transforms.transform_save_stream(items[row], raw)
        return stream, tuple(descriptors or ())

    return through


class StorageReaderTransforms:
    """Streams that an entry passes through on its way from a file."""

    def __init__(self, extension_registry: ExtensionRegistry | None = None) -> None:
        self.extension_registry = extension_registry or ExtensionRegistry()

    def transform_load_stream(
        self, read_item: ReadItem, transform_descriptors: Sequence[str], raw_stream: IO[bytes]
    ) -> IO[bytes]:
        """The entry with its transforms undone. Raises ValueError for an unknown one."""
        stream = raw_stream
        for extension in self.extension_registry.from_descriptor_list(transform_descriptors):
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        return stream


class _EndOfEntry(io.RawIOBase):
    """Passes everything on except closing: other entries follow in the same file."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        remaining = view
        while remaining:
            written_bytes = self._raw.write(remaining)
            remaining = remaining[len(remaining) if written_bytes is None else written_bytes :]
        return len(view)

    def close(self) -> None:
        if not self.closed:
            self._raw.flush()
        super().close()


class FileSlice(io.RawIOBase):
    """A slice of a seekable file that looks like a separate file."""

    def __init__(self, base: Any, offset: int, length: int) -> None:
        self._base = base
        self._offset = offset
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"expected a place within the slice, got {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted_bytes = max(0, min(len(view), self._length - self._at))
        self._base.seek(self._offset + self._at)
        read_bytes = 0
        while read_bytes < wanted_bytes:
            part = self._base.read(wanted_bytes - read_bytes)
            if not part:
                break
            view[read_bytes : read_bytes + len(part)] = part
            read_bytes += len(part)
        self._at += read_bytes
        return read_bytes
