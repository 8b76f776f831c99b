"""Copies of state dicts whose memory is used again: torch's `StateDictStager`.

For libraries that stage states themselves. Tensors of one storage stay tensors of one storage, and
a storage that was copied before is copied into the same memory: a second copy of a state overwrites
the first. `async_save` stages in another way (`stager`), which never overwrites a copy in use.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from pytest_dcp._engine.staging.buffer_pool import pin_pages, unpin_pages
from pytest_dcp._engine.staging.deep_copy import DeepCopy, Memo
from pytest_dcp._torch_internals.checkpoint_classes import StateDictStagerOfTorch
from pytest_dcp._torch_internals.tensors import identity_of_storage
from pytest_dcp.tracebacks import warn_caller

_NOTHING: list[Any] = []


class StateDictStager(StateDictStagerOfTorch):
    """Deep copies of states, with all tensors on the CPU.

    torch's class of this name is a base for the sake of `isinstance`; its methods are not used.
    """

    def __init__(
        self,
        pin_memory: bool = False,
        share_memory: bool = False,
        pin_memory_min_bytes: int = 5,
    ) -> None:
        """pin_memory: lock the copies' pages for asynchronous copies from a GPU; needs CUDA.

        share_memory: copy to memory that `torch.multiprocessing` sends to other processes.
        pin_memory_min_bytes: storages smaller than this are not pinned.
        """
        if pin_memory and not torch.cuda.is_available():
            warn_caller(
                "pin_memory=True has no effect: pages can be pinned only where CUDA is available",
            )
            pin_memory = False
        self.pin_memory = pin_memory
        self.share_memory = share_memory
        self.pin_memory_min_bytes = pin_memory_min_bytes
        self._cached_storage_mapping = WeakIdKeyDictionary()
        """Copies by the storage that they are of, until that one is freed."""

    def stage(self, state_dict: Any, non_blocking: bool = False) -> Any:
        """A deep copy of a state, or of any value.

        It shares the memory of earlier copies of the same storages, which change with it.

        non_blocking: do not wait for copies from a GPU; synchronize the stream before reading.
        """
        return self.deepcopy_with_tensor_offload(state_dict, non_blocking=non_blocking)

    @torch.no_grad()
    def deepcopy_with_tensor_offload(
        self,
        x: Any,
        memo: Memo | None = None,
        _nil: Any = _NOTHING,
        non_blocking: bool = False,
    ) -> Any:
        """`copy.deepcopy(x, memo)`, with all tensors on the CPU. `_nil` has no effect."""
        copying = DeepCopy(memo)
        copied = copying.copy(x)
        copies = {
            identity_of_storage(storage): self._copy_storage(storage, non_blocking)
            for storage in copying.storages()
        }
        copying.settle(lambda storage: copies[identity_of_storage(storage)])
        return copied

    def close(self) -> None:
        """Forget all copies; their memory is freed with the last tensor in it."""
        self._cached_storage_mapping.clear()

    def _copy_storage(self, storage: torch.UntypedStorage, non_blocking: bool) -> Any:
        cache: Any = self._cached_storage_mapping
        copied = cache.get(storage)
        if copied is None or copied.nbytes() != storage.nbytes():
            copied = self._new_storage(storage.nbytes())
            cache[storage] = copied
        copied.copy_(storage, non_blocking=non_blocking)
        return copied

    def _new_storage(self, nbytes: int) -> torch.UntypedStorage:
        storage = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        if self.share_memory and nbytes:
            storage.share_memory_()
        if self.pin_memory and nbytes >= max(self.pin_memory_min_bytes, 1):
            address = storage.data_ptr()
            if pin_pages(address, nbytes):
                # Not at exit: CUDA may be gone by then.
                weakref.finalize(storage, unpin_pages, address).atexit = False
        return storage
