"""The file of `torch.save`: mapped to be unpickled, read by position for its elements.

A mapped page that is touched after the file was cut off ends the process (SIGBUS), and `torch.save`
cuts off the file that it writes over. So the mapping only says where each element lies; the bytes
come through the open descriptor, where a file that has changed is an error.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch

from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp._engine.io.tensor_memory import memory_of
from pytest_dcp.errors import CheckpointReplacedError

PathLike = str | os.PathLike[str]
WINDOW_BYTES = 16 << 20
"""Read at a time into memory of its own, where elements are not copied as they lie."""
SMALL_BYTES = 4 << 10
MOST_WASTE = 8
"""A part with gaps is read with them, if it is small, or if less than this many times its own
bytes are read. Otherwise it is split: a column of a large matrix takes a read for each row."""


class TorchSaveFile:
    """An open file, and the memory where it is mapped."""

    def __init__(self, path: PathLike) -> None:
        """Raises OSError if it cannot be opened; ValueError if it is empty."""
        self.path = Path(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - until `close`
        try:
            self.mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except BaseException:
            self._file.close()
            raise
        self._address = torch.frombuffer(self.mapped, dtype=torch.uint8, count=1).data_ptr()
        self._size = len(self.mapped)
        self._identity = self._look()

    def copy_part(self, part: torch.Tensor, target: torch.Tensor) -> int:
        """Copy a part of a tensor that lies in the mapping; returns the bytes read.

        Raises CheckpointReplacedError if the file was written to since it was opened.
        """
        self._check_unchanged()
        read_bytes = self._copy(part, target)
        self._check_unchanged()
        return read_bytes

    def identify(self) -> str:
        """The size and time of modification at the opening."""
        return repr(self._identity)

    def close(self) -> None:
        """Close the file. The mapping ends with the last tensor in it."""
        self._file.close()
        del self.mapped

    def _copy(self, part: torch.Tensor, target: torch.Tensor) -> int:
        start = part.data_ptr() - self._address
        if not part.numel() or not 0 <= start < self._size:
            target.copy_(part)  # No elements, or in memory of its own.
            return 0
        if _is_same_memory(part, target):
            return self._read(start, target)
        steps = [(n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True)]
        span = 1 + sum(steps)
        if _is_read_at_once(span * part.itemsize, part.numel() * part.itemsize):
            return self._read_span(start, span, part, target)
        dim = steps.index(max(steps))
        half = part.shape[dim] // 2
        return sum(
            self._copy(part.narrow(dim, *piece), target.narrow(dim, *piece))
            for piece in ((0, half), (half, part.shape[dim] - half))
        )

    def _read_span(self, start: int, span: int, part: torch.Tensor, target: torch.Tensor) -> int:
        """Read from the part's first element to its last, and copy those that it has."""
        memory = torch.empty(span, dtype=part.dtype)
        read_bytes = self._read(start, memory)
        read = memory.as_strided(part.shape, part.stride())
        read = read.conj() if part.is_conj() else read
        target.copy_(-read if part.is_neg() else read)
        return read_bytes

    def _read(self, start: int, memory: torch.Tensor) -> int:
        view = memory_of(memory)
        file = LocalIn(self._file.fileno(), self._size, path=self.path)
        if file.read_into(start, view) != len(view):
            raise self._replaced_error()
        return len(view)

    def _look(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._look() != self._identity:
            raise self._replaced_error()

    def _replaced_error(self) -> CheckpointReplacedError:
        return CheckpointReplacedError(
            f"{self.path} was written over since it was opened: open it again"
        )


def _is_same_memory(part: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the target's memory is, byte for byte, what lies in the file."""
    return (
        part.is_contiguous()
        and target.is_contiguous()
        and part.dtype == target.dtype
        and target.device.type == "cpu"
        and (part.is_conj(), part.is_neg()) == (target.is_conj(), target.is_neg())
    )


def _is_read_at_once(span_bytes: int, own_bytes: int) -> bool:
    if span_bytes > WINDOW_BYTES:
        return False
    return span_bytes <= SMALL_BYTES or span_bytes < MOST_WASTE * own_bytes
