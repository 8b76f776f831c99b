"""A state for the process that writes files, in which tied tensors stay tied.

A file of `torch.save` has each storage once. So a state is staged storage by storage into one block
of shared memory. Its pickle has, for each tensor, the storage's part of the block and the tensor's
place in that part. The process maps the block, and makes one storage of each part.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from pytest_dcp._engine.background.state_transfer import Shipment, StatePickler
from pytest_dcp._engine.staging.buffer_pool import Memory, Pool, bytes_of_storages, memory_around
from pytest_dcp._engine.staging.deep_copy import DeepCopy
from pytest_dcp._engine.staging.stager import KEPT_SHARED, DefaultStager
from pytest_dcp._torch_internals.tensors import identity_of_storage


class TiedStager(DefaultStager):
    """Copies states as `copy.deepcopy` would, with all storages in one block of memory."""

    def _copy_state(self, state_dict: Any, *, pin: bool, blocking: bool) -> Any:
        return stage_tied(state_dict, self._pool, pin=pin, blocking=blocking)


@torch.no_grad()
def stage_tied(state: Any, pool: Pool, *, pin: bool = True, blocking: bool = False) -> Any:
    """A deep copy of a state on the CPU, in memory of the pool; tied tensors stay tied.

    pin: lock the memory if tensors are on a GPU. blocking: wait after each copy, not once for all.
    """
    copying = DeepCopy()
    copied = copying.copy(state)
    sources = list(copying.storages())
    on_gpu = {storage.device for storage in sources if storage.device.type == "cuda"}
    sizes = [storage.nbytes() for storage in sources]
    arena = pool.lease(bytes_of_storages(sizes))
    if on_gpu and pin:
        arena.memory.pin()
    queued = bool(on_gpu) and arena.memory.pinned and not blocking
    copies = {}
    for source, copied_storage in zip(sources, arena.storages(sizes), strict=True):
        copied_storage.copy_(source, non_blocking=queued)
        copies[identity_of_storage(source)] = copied_storage
    copying.settle(lambda storage: copies[identity_of_storage(storage)])
    for device in on_gpu if queued else ():
        torch.cuda.current_stream(device).synchronize()
    return copied


def ship_tied(state: Any) -> Shipment:
    """Prepare a state for sending; stage it first unless it is in shared memory already.

    Raises TypeError, or the error from pickling a value.
    """
    stream = io.BytesIO()
    pickler = _TiedPickler(stream)
    pickler.dump(state)
    if pickler.strays:
        state = stage_tied(state, KEPT_SHARED)
        stream = io.BytesIO()
        pickler = _TiedPickler(stream)
        pickler.dump(state)
    return Shipment(stream.getvalue(), pickler.memory, state)


def unpickle_tied(data: bytes, fd: int | None, nbytes: int) -> Any:
    """The state, its tensors in the descriptor's shared memory; closes the descriptor."""
    mapped = None
    if fd is not None:
        try:
            mapped = mmap.mmap(fd, nbytes)
        finally:
            os.close(fd)
    return _TiedUnpickler(io.BytesIO(data), mapped).load()


class _TiedPickler(StatePickler):
    """Pickles tensors as places in the shared memory of the first tensor."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, None)
        self.memory: Memory | None = None
        self.strays = False
        """Whether a tensor is not in that memory, so that its bytes are in the pickle."""

    def _place_of(self, tensor: torch.Tensor) -> tuple[Any, ...] | None:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return None
        if tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
            return None
        storage = tensor.untyped_storage()
        start, nbytes = storage.data_ptr(), storage.nbytes()
        if nbytes:
            found = memory_around(start, nbytes)
            self.memory = self.memory or found
            if found is None or found is not self.memory:
                self.strays = True
                return None
            start -= found.address
        where = (tensor.storage_offset(), tuple(tensor.size()), tensor.stride())
        return tensor_in_storage, (start if nbytes else -1, nbytes, tensor.dtype, *where)


class _TiedUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, mapped: mmap.mmap | None) -> None:
        super().__init__(stream)
        self._mapped = mapped
        self._storages: dict[int, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (tensor_in_storage.__module__, tensor_in_storage.__name__):
            return self._place
        return super().find_class(module, name)

    def _place(
        self,
        start: int,
        nbytes: int,
        dtype: torch.dtype,
        offset: int,
        size: Sequence[int],
        stride: Sequence[int],
    ) -> torch.Tensor:
        storage = self._storages.get(start)
        if storage is None or not nbytes:
            if nbytes and self._mapped is None:
                raise ValueError("the pickle names shared memory, but none came with it")
            storage = self._storages[start] = (
                torch.frombuffer(self._mapped, dtype=torch.uint8, count=nbytes, offset=start)
                if nbytes
                else torch.empty(0, dtype=torch.uint8)
            ).untyped_storage()
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def tensor_in_storage(*_: Any) -> torch.Tensor:
    """Represents a tensor in shared memory in the pickles that `unpickle_tied` reads."""
    raise TypeError("a state for the writing process is read by `unpickle_tied` only")
