"""Memory in which a whole state is staged: one stretch, reused from one save to the next.

Fresh memory costs many times more than the copy into it, since the kernel has to find and clear
every page. So a `Pool` keeps the memory of the last states, at most `IDLE` stretches, and leases it
for the next. A stretch returns to the pool when the last tensor in it is gone: while a planner, a
sending storage or the user holds one, it is not overwritten.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("pytest_dcp.checkpoint")

IDLE = 2
"""Unused stretches that a pool keeps: one for each of two states that are saved in turn."""
SPARE = 2
"""A stretch serves states of at least this part of its size: a state that shrank gets another."""
PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU of this process (driver_types.h)."""
ALIGNMENT = 64
"""Bytes: suits every dtype, and copies start at a line of the processor's cache."""


class Memory:
    """A stretch of pages: private to this process, or shared through a descriptor."""

    def __init__(self, nbytes: int, *, shared: bool) -> None:
        self.nbytes = max(nbytes, mmap.PAGESIZE)
        self.fd = -1
        self.pinned = False
        if shared and hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("pytest_dcp-staging", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, self.nbytes)
            self.pages = mmap.mmap(self.fd, self.nbytes)
        else:
            # Windows has neither these flags, nor fork, from which they keep the memory private.
            private = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")
            how = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if private else {}
            self.pages = mmap.mmap(-1, self.nbytes, **how)
        self.address: int = np.frombuffer(self.pages, dtype=np.uint8).ctypes.data

    def pin(self) -> None:
        """Lock the pages for asynchronous copies from a GPU, where CUDA can do that."""
        if not self.pinned:
            self.pinned = pin_pages(self.address, self.nbytes)

    def __del__(self) -> None:
        if getattr(self, "pinned", False):
            unpin_pages(self.address)
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)


class Arena:
    """A lease of memory, for the tensors of one state."""

    def __init__(self, memory: Memory, array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        self.memory = memory
        self._array = array
        self._bytes = torch.from_numpy(array)

    def allocate_like(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors of these dtypes and shapes, row-major, with arbitrary values.

        Tensors of one dtype lie together, so that one call cuts them all.
        """
        rooms = list(like)
        end = 0
        for dtype, rows in _by_dtype(like).items():
            sizes = [like[row].numel() for row in rows]
            start, end = end, end + _align(sum(sizes) * dtype.itemsize)
            flat = view_bytes(self._bytes, start, dtype, (sum(sizes),))
            for row, part in zip(rows, torch.split(flat, sizes), strict=True):
                rooms[row] = part if like[row].dim() == 1 else part.view(like[row].shape)
        return rooms

    def storages(self, sizes: Sequence[int]) -> list[torch.UntypedStorage]:
        """Storages of these sizes, in bytes; each is a storage of its own, with arbitrary bytes."""
        storages, start = [], 0
        for nbytes in sizes:
            if nbytes:
                # Keeps the array alive, as a view by numpy need not.
                part = torch.frombuffer(self._array, dtype=torch.uint8, count=nbytes, offset=start)
            else:
                part = torch.empty(0, dtype=torch.uint8)
            storages.append(part.untyped_storage())
            start += _align(nbytes)
        return storages


def bytes_of_storages(sizes: Sequence[int]) -> int:
    """The size that an arena for storages of these sizes needs."""
    return sum(map(_align, sizes))


def needed_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """The sizes that an arena for these tensors needs."""
    return sum(
        _align(sum(tensors[row].numel() for row in rows) * dtype.itemsize)
        for dtype, rows in _by_dtype(tensors).items()
    )


def _by_dtype(tensors: Sequence[torch.Tensor]) -> dict[torch.dtype, list[int]]:
    found: dict[torch.dtype, list[int]] = {}
    for row, tensor in enumerate(tensors):
        found.setdefault(tensor.dtype, []).append(row)
    return found


class Pool:
    """Memory of earlier states, for later ones. Safe to use from several threads."""

    def __init__(self, *, shared: bool) -> None:
        """shared: other processes can map the memory, through its descriptor, on Linux."""
        self.shared = shared
        self.idle: list[Memory] = []
        """The stretch that was returned last is last."""
        self._leased_bytes = 0
        # Memory may be returned in any thread at any allocation, even in this class.
        self._lock = threading.RLock()
        self._open = True

    def available_bytes(self, budget_bytes: int) -> int:
        """How much of the budget the states that are in use now leave."""
        with self._lock:
            return max(0, budget_bytes - self._leased_bytes)

    def lease(self, nbytes: int, budget_bytes: int | None = None) -> Arena:
        """Memory for `nbytes`.

        budget_bytes: frees idle memory that would make the pool larger than this.
        """
        memory = self._find_fitting(nbytes, budget_bytes)
        if memory is None:
            if budget_bytes is not None:
                self._free_idle_beyond(budget_bytes - nbytes)
            memory = Memory(nbytes, shared=self.shared)
        with self._lock:
            self._leased_bytes += memory.nbytes
        array = np.frombuffer(memory.pages, dtype=np.uint8)
        # Tensors keep the array alive, so its finalizer reports their end.
        weakref.finalize(array, self._take_back, memory).atexit = False
        if memory.fd >= 0:
            _shared[memory.address] = memory
        return Arena(memory, array)

    def clear(self) -> None:
        """Free all memory that holds no tensor."""
        with self._lock:
            self.idle = []

    def close(self) -> None:
        """Free all memory; memory in use is freed once it is not."""
        self._open = False
        self.clear()

    def _find_fitting(self, nbytes: int, budget_bytes: int | None) -> Memory | None:
        with self._lock:
            largest = max(SPARE * nbytes, mmap.PAGESIZE)
            if budget_bytes is not None:
                largest = min(largest, max(budget_bytes - self._leased_bytes, mmap.PAGESIZE))
            for memory in reversed(self.idle):
                if nbytes <= memory.nbytes <= largest:
                    self.idle.remove(memory)
                    return memory
            del self.idle[: len(self.idle) + 1 - IDLE]
            return None

    def _free_idle_beyond(self, budget_bytes: int) -> None:
        """Free the idle memory that was returned first, until the pool has room in the budget."""
        with self._lock:
            while self.idle and (
                self._leased_bytes + sum(memory.nbytes for memory in self.idle) > budget_bytes
            ):
                del self.idle[0]

    def _take_back(self, memory: Memory) -> None:
        with self._lock:
            self._leased_bytes -= memory.nbytes
            if self._open:
                self.idle.append(memory)
                del self.idle[:-IDLE]


_shared: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
"""By address."""


def shared_memory_of(tensor: torch.Tensor) -> Memory | None:
    """The shared memory that the tensor was placed in, if it was."""
    return _shared.get(tensor.untyped_storage().data_ptr())


def memory_around(address: int, nbytes: int) -> Memory | None:
    """The shared memory that holds these bytes of this process, if any does."""
    for memory in list(_shared.values()):
        if memory.address <= address and address + nbytes <= memory.address + memory.nbytes:
            return memory
    return None


def view_bytes(
    flat: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The bytes from `start` on as a row-major tensor."""
    end = start + torch.Size(shape).numel() * dtype.itemsize
    return flat[start:end].view(dtype).view(shape)


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pin_pages(address: int, nbytes: int) -> bool:
    """Lock pages for asynchronous copies from a GPU; whether CUDA could do it."""
    return _cuda("cudaHostRegister", address, nbytes, PORTABLE)


def unpin_pages(address: int) -> None:
    """Unlock pages that `pin_pages` locked."""
    _cuda("cudaHostUnregister", address)


def _cuda(call: str, *args: int) -> bool:
    """Whether a call of the CUDA runtime succeeded. Without it copies are only slower."""
    with contextlib.suppress(Exception):  # a driver that is gone, at the end of the process
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's own
        code = int(getattr(runtime, call)(*args))
        if code == 0:
            return True
        logger.debug("%s gave %d: staging memory is not pinned", call, code)
    return False
