"""Unpickles by Python's own unpickler, which runs the code that a pickle asks for: only for files
whose writer the user trusts. Storages are made by the caller, so that no elements need to be read.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch

from pytest_dcp._engine.unpickle.tensor_pickles import STORAGE_DTYPES
from pytest_dcp._torch_internals.tensors import make_typed_storage

MakeStorage = Callable[[str], torch.UntypedStorage]
"""A storage by its key."""


def unpickle_trusted(pickled: bytes | memoryview, make_storage: MakeStorage) -> Any:
    """The value of a `data.pkl` of `torch.save`. Raises any error of the code that it runs."""
    return _TrustedUnpickler(pickled, make_storage).load()


class _StorageOf:
    """Stands for a storage class of torch, whose names warn that they are deprecated."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _TrustedUnpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes | memoryview, make_storage: MakeStorage) -> None:
        super().__init__(io.BytesIO(pickled), encoding="utf-8")  # torch.load's encoding
        self._make_storage = make_storage

    def find_class(self, module: str, name: str) -> Any:
        """The object of this name; the dtype for a storage class."""
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return _StorageOf(STORAGE_DTYPES[name])
        return super().find_class(module, name)

    def persistent_load(self, saved_id: Any) -> Any:
        """The storage of ('storage', class, key, location, elements)."""
        kind, storage_class, key, *_ = saved_id
        if kind != "storage" or not isinstance(storage_class, _StorageOf):
            raise pickle.UnpicklingError(
                f"expected a reference to a storage, got {saved_id!r:.200}"
            )
        return make_typed_storage(self._make_storage(key), storage_class.dtype)
