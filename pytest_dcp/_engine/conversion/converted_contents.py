"""An open checkpoint and the changes to make -> tensors and values for the target, by new name.

All directions of a conversion use this. Tensors are read part by part into memory that the
writer of the target gives; a part of another dtype is cast while it is copied.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pytest_dcp._engine.conversion.changes import Changes, check_cast
from pytest_dcp._engine.io.tensor_batches import Slab
from pytest_dcp._engine.lazy_reading.contents import BoxToRead
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint
from pytest_dcp._engine.plan.containers import Description
from pytest_dcp._engine.plan.nested import Path as KeyPath
from pytest_dcp._engine.plan.nested import Room
from pytest_dcp.garbage_collection import collector_paused

PathLike = str | os.PathLike[str]
Source = PathLike | OpenCheckpoint
"""A path, a URL, or a checkpoint that is open already."""


@dataclass(frozen=True, slots=True)
class ConvertedTensor:
    """One tensor of the target."""

    source: str
    """Its name in the source."""
    name: str
    """In the target."""
    shape: tuple[int, ...]
    stored_dtype: torch.dtype
    dtype: torch.dtype
    """In the target."""

    @property
    def nbytes(self) -> int:
        """In the target."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The result of a conversion."""

    tensors: int
    """That the target has."""
    values: int
    """That the target has."""
    nbytes: int
    """Of the target's tensors."""
    bytes_read: int
    """From the source's data files."""
    converted_dtypes: tuple[str, ...] = ()
    """The target's names of tensors whose dtype is another one than the source's."""
    left_out: tuple[str, ...] = ()
    """The source's names of values that the target cannot hold."""


class TensorsToConvert:
    """Tensors of the target, read from an open checkpoint."""

    def __init__(self, checkpoint: OpenCheckpoint, tensors: Iterable[ConvertedTensor]) -> None:
        self.checkpoint = checkpoint
        self.tensors = {tensor.name: tensor for tensor in tensors}
        """By the target's name."""
        self._memory = _BatchMemory()

    def read_parts(self, parts: Sequence[tuple[str, tuple[int, ...], torch.Tensor]]) -> None:
        """Fill memory with parts of tensors: the target's name, the offset, the memory."""
        self.checkpoint.read_boxes(
            [BoxToRead(self.tensors[name].source, offset, memory) for name, offset, memory in parts]
        )

    def read_slabs(self, slabs: Sequence[Slab]) -> list[torch.Tensor]:
        """Parts of the target's tensors. Their memory is valid until this thread's next read."""
        # Thousands of small tensors are no garbage: the collector would take half of the time.
        with collector_paused():
            memory = self._memory.allocate(slabs)
            self.read_parts(
                [(slab.fqn, slab.offset, part) for slab, part in zip(slabs, memory, strict=True)]
            )
        return memory

    def read_whole(self, name: str) -> torch.Tensor:
        """A full tensor of the target. Its memory is valid until this thread's next read."""
        tensor = self.tensors[name]
        whole = Slab(name, tensor.dtype, (0,) * len(tensor.shape), tensor.shape)
        return self.read_slabs([whole])[0]


class ConvertedContents(TensorsToConvert):
    """The tensors and values of the target, read from an open checkpoint."""

    def __init__(
        self, checkpoint: OpenCheckpoint, changes: Changes, *, weights_only: bool = True
    ) -> None:
        """weights_only: False allows values and containers of any class, which can run code."""
        super().__init__(checkpoint, ())
        self.changes = changes
        self._weights_only = weights_only
        self.values: dict[str, str] = {}
        """By the target's name, the source's."""
        for name, new in changes.choose(tuple(checkpoint), checkpoint.where).items():
            lazy = checkpoint[name]
            if isinstance(lazy, LazyTensor):
                dtype = changes.dtype_of(name, lazy.dtype)
                check_cast(name, lazy.dtype, dtype)
                shape = tuple(lazy.shape)
                self.tensors[new] = ConvertedTensor(name, new, shape, lazy.dtype, dtype)
            else:
                self.values[new] = name

    def read_value(self, name: str) -> Any:
        """A value of the target. Raises UntrustedPickleError, naming it, for a class that
        `weights_only` does not allow.
        """
        return self.checkpoint.read_value(self.values[name], weights_only=self._weights_only)

    def build_state(self, leaf: Callable[[str], Any]) -> dict[Any, Any]:
        """The target's state dict, with a leaf for each name.

        It has the containers of the source, if all names are kept; otherwise it is flat. Raises
        CheckpointMismatchError for containers of other classes than Python's own, unless all are
        trusted.
        """
        state: dict[str, Any] = {}
        names = [*self.tensors, *self.values]
        room = Room(len(names))
        for name in names:
            room.put(state, name, room.check_path(name, self._path_of(name)), leaf(name))
        if not self.changes.keeps_names or self.checkpoint.containers is None:
            return state
        containers = Description(self.checkpoint.containers)
        return containers.rebuilt(state, lambda path: True, trusted=not self._weights_only)

    def report(
        self, *, values: int, left_out: Sequence[str] = (), bytes_read: int = 0
    ) -> ConversionReport:
        """The result, at the end. bytes_read: by other processes."""
        tensors = self.tensors.values()
        return ConversionReport(
            tensors=len(tensors),
            values=values,
            nbytes=sum(tensor.nbytes for tensor in tensors),
            bytes_read=self.checkpoint.bytes_read + bytes_read,
            converted_dtypes=tuple(t.name for t in tensors if t.dtype != t.stored_dtype),
            left_out=tuple(left_out),
        )

    def _path_of(self, name: str) -> KeyPath:
        if not self.changes.keeps_names:
            return (name,)
        path = self.checkpoint.path_of(name)
        return path if ".".join(map(str, path)) == name else (name,)


class _BatchMemory(threading.local):
    """Memory of each thread for one batch: always the same, since fresh pages cost as much as the
    copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def allocate(self, slabs: Sequence[Slab]) -> list[torch.Tensor]:
        """Memory for each slab, aligned to its elements."""
        starts, end = [], 0
        for slab in slabs:
            start = -(-end // slab.dtype.itemsize) * slab.dtype.itemsize
            starts.append(start)
            end = start + slab.nbytes
        if self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.uint8)
        return [
            self._buffer[start : start + slab.nbytes].view(slab.dtype).view(slab.shape)
            for start, slab in zip(starts, slabs, strict=True)
        ]


@contextmanager
def open_source(
    source: Source,
    changes: Changes,
    storage_options: Mapping[str, Any] | None = None,
    *,
    weights_only: bool = True,
) -> Iterator[ConvertedContents]:
    """The contents of the target. A source that was open stays open."""
    if isinstance(source, OpenCheckpoint):
        yield _convert_contents(source, changes, weights_only=weights_only)
        return
    with open_checkpoint(source, storage_options=storage_options) as checkpoint:
        yield _convert_contents(checkpoint, changes, weights_only=weights_only)


def _convert_contents(
    checkpoint: OpenCheckpoint, changes: Changes, *, weights_only: bool
) -> ConvertedContents:
    with collector_paused():
        return ConvertedContents(checkpoint, changes, weights_only=weights_only)
