"""A file of `torch.save` that is being made, mapped: its tensors are filled where they will lie.

    allocate   a place in the file for each tensor; the file has its size
    tensor     the place as a tensor, to be filled
    close      everything else: the pickle, the values, the directory

Only the pages that are being filled are in memory, and the system may write them out at any time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.entry import contiguous_stride
from pytest_dcp._engine.format.state_dict_archive import (
    TensorPlace,
    close_archive,
    pickle_state_dict,
    place_tensors,
)
from pytest_dcp._torch_internals.tensors import identity_of_storage


class MappedArchive:
    """The file behind a descriptor that can be read and written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._places: dict[str, TensorPlace] = {}
        self._keys: dict[int, str] = {}
        """Of the storages of tensors given out, by identity: their keys in the archive."""
        self._mapped: mmap.mmap | None = None

    def allocate(self, sizes: Mapping[str, int]) -> None:
        """Give each tensor a place. sizes: in bytes. Raises OSError if the disk is too small."""
        places, end = place_tensors(list(sizes.values()))
        self._places = dict(zip(sizes, places, strict=True))
        self._keys = {}
        os.ftruncate(self._fd, 0)
        # Writing into a mapped file on a full disk would kill the process: allocate space first.
        # macOS and Windows cannot do that.
        operating_system.extend_file(self._fd, max(end, mmap.PAGESIZE))
        self._mapped = mmap.mmap(self._fd, max(end, mmap.PAGESIZE))

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor in its place."""
        place = self._places[name]
        if not place.nbytes:
            tensor = torch.empty(tuple(shape), dtype=dtype)
        else:
            assert self._mapped is not None
            raw = torch.frombuffer(
                self._mapped, dtype=torch.uint8, offset=place.offset, count=place.nbytes
            )
            size = torch.Size(shape)
            tensor = torch.empty(0, dtype=dtype)
            tensor.set_(raw.untyped_storage(), 0, size, contiguous_stride(size))
        self._keys[identity_of_storage(tensor.untyped_storage())] = place.key
        return tensor

    def close(self, state_dict: Mapping[Any, Any]) -> None:
        """Complete the file. The state dict holds the tensors that were given out."""
        assert self._mapped is not None
        view = memoryview(self._mapped)
        placed = list(self._places.values())
        crcs = [crc32(view[one.offset : one.offset + one.nbytes]) for one in placed]
        pickled, others = pickle_state_dict(
            state_dict, lambda storage: self._keys.get(identity_of_storage(storage))
        )
        contents = {key: _bytes_of(storage) for key, storage in others.items()}
        end = 0
        for piece in close_archive(placed, crcs, pickled, contents):
            end = max(end, piece.offset + _write_all(self._fd, piece.content, piece.offset))
        os.ftruncate(self._fd, end)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    content: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return memoryview(content)


def _write_all(fd: int, content: bytes | memoryview, offset: int) -> int:
    """Write all of it at the offset; return the number of bytes."""
    remaining = memoryview(content)
    while remaining:
        written_bytes = operating_system.write_at(fd, remaining, offset)
        remaining, offset = remaining[written_bytes:], offset + written_bytes
    return len(content)
