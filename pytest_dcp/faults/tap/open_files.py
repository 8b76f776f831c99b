"""A stand-in for `open` whose file objects reach the storage through the functions of `os_calls`.

Buffers are Python's own: a write appears when the buffer gives it to the kernel.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import IO, Any

from pytest_dcp.faults.tap import os_calls
from pytest_dcp.faults.tap.watches import REGISTRY

real_open = io.open


class WatchedFile(io.FileIO):
    """An unbuffered file of a watched root."""

    def readinto(self, buffer: Any, /) -> int:
        """Read into the buffer. Returns the number of bytes, 0 at the end."""
        self._must(self.readable(), "reading")
        return os_calls.readv(self.fileno(), [buffer])

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most `size` bytes with one read, or all remaining."""
        if size is None or size < 0:
            return self.readall()
        self._must(self.readable(), "reading")
        return os_calls.read(self.fileno(), size)

    def readall(self) -> bytes:
        """Read all remaining bytes."""
        self._must(self.readable(), "reading")
        parts = []
        while part := os_calls.read(self.fileno(), 1 << 20):
            parts.append(part)
        return b"".join(parts)

    def write(self, data: Any, /) -> int:
        """Write with one operation. Returns the number of bytes taken."""
        self._must(self.writable(), "writing")
        return os_calls.write(self.fileno(), data)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the file's size, by default to the current position."""
        self._must(self.writable(), "writing")
        length = self.tell() if size is None else size
        os_calls.ftruncate(self.fileno(), length)
        return length

    def close(self) -> None:
        """Close the descriptor, if this object owns it."""
        descriptor = None if self.closed or not self.closefd else REGISTRY.descriptor(self.fileno())
        if descriptor is None:
            super().close()
        else:
            os_calls.close_descriptor(self.fileno(), descriptor, super().close)

    def _must(self, able: bool, what: str) -> None:
        if not able:
            raise io.UnsupportedOperation(f"File not open for {what}")


def open(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Callable[[Any, int], int] | None = None,
) -> IO[Any]:
    """Like the builtin `open`."""
    if REGISTRY.place(file) is None:
        return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    binary = "b" in mode
    if len(set(mode)) != len(mode) or set(mode) - set("rwxabt+") or ("t" in mode and binary):
        raise ValueError(f"invalid mode: {mode!r}")
    if binary and (encoding, errors, newline) != (None, None, None):
        raise ValueError("binary mode takes no encoding, errors or newline argument")
    if not binary and buffering == 0:
        raise ValueError("can't have unbuffered text I/O")
    raw_mode = mode.replace("b", "").replace("t", "")
    raw = WatchedFile(file, raw_mode, closefd, opener or _open)
    try:
        return _over(raw, mode, buffering, encoding, errors, newline)
    except BaseException:
        raw.close()
        raise


def _open(path: Any, flags: int) -> int:
    return os_calls.open(path, flags, 0o666)


def _over(
    raw: WatchedFile,
    mode: str,
    buffering: int,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
) -> IO[Any]:
    """The buffer, and the text layer, over an unbuffered file."""
    if buffering == 0:
        return raw
    size = buffering if buffering > 1 else max(os.fstat(raw.fileno()).st_blksize, 512)
    buffered: Any
    if "+" in mode:
        buffered = io.BufferedRandom(raw, size)
    elif "r" in mode:
        buffered = io.BufferedReader(raw, size)
    else:
        buffered = io.BufferedWriter(raw, size)
    if "b" in mode:
        return buffered  # type: ignore[no-any-return]  # one of the three
    text: Any = io.TextIOWrapper(
        buffered, io.text_encoding(encoding), errors, newline, line_buffering=buffering == 1
    )
    text.mode = mode
    return text  # type: ignore[no-any-return]  # typed without its mode, which open sets
