"""A whole state dict as `torch.save` writes it, given from its first byte to its last.

The archive begins with a record for each tensor; the pickle, which also holds the values, comes
after them. A reader finds records by name, so we can choose the order. A record's CRC stands behind
its content, so that nothing has to be known of a tensor's elements before they are written.

    archive = StateDictArchive()
    pickle_state_dict    the pickle, where `PlacedTensor` stands for a tensor in the archive
    archive.begin        the bytes before a tensor's elements, which the caller writes next
    archive.end          the bytes after them, given their CRC
    archive.close        all other bytes: the pickle, the values' storages, the directory

Pure (no I/O).
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pytest_dcp._engine.format.archive_layout import ArchiveLayout, add_constants
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.entry import contiguous_stride
from pytest_dcp._engine.format.python_values import PICKLE_PROTOCOL
from pytest_dcp._torch_internals.tensors import identity_of_storage, take_apart_typed_storage

StorageId = tuple[str, object, str, str, int]
"""As torch's pickles refer to a storage: ("storage", class, key, "cpu", elements)."""


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """Stands in a state dict for a contiguous tensor whose elements are a record of the archive."""

    key: str
    """Of the storage in the pickle: the record is `data/{key}`."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return self.numel * self.dtype.itemsize


class StateDictArchive:
    """The bytes of an archive around the elements of its tensors, in their order."""

    def __init__(self) -> None:
        self._layout = ArchiveLayout()

    def begin(self, tensor: PlacedTensor) -> bytes:
        """The bytes before the tensor's elements."""
        self._layout.begin(_record(tensor.key), tensor.nbytes)
        return self._layout.take()

    def end(self, tensor: PlacedTensor, crc: int) -> bytes:
        """The bytes after the tensor's elements. crc: CRC-32 of them."""
        self._layout.skip(tensor.nbytes)
        self._layout.end(_record(tensor.key), tensor.nbytes, crc)
        return self._layout.take()

    def close(
        self, pickled: bytes, others: Mapping[str, torch.UntypedStorage]
    ) -> Iterator[bytes | memoryview]:
        """The rest of the archive, after the last tensor: as `pickle_state_dict` gave it."""
        layout = self._layout
        layout.add(b"archive/data.pkl", pickled)
        add_constants(layout)
        for key, storage in others.items():
            content = _bytes_of(storage)
            layout.begin(_record(key), len(content))
            yield layout.take()
            yield content
            layout.skip(len(content))
            layout.end(_record(key), len(content), crc32(content))
        layout.add(b"archive/version", b"3\n")
        tail, _ = layout.finish()
        yield tail


def pickle_state_dict(state_dict: object) -> tuple[bytes, dict[str, torch.UntypedStorage]]:
    """The pickle of a state dict, and the storages that it refers to besides the placed ones."""
    stream = io.BytesIO()
    pickler = _StatePickler(stream)
    pickler.dump(state_dict)
    return stream.getvalue(), pickler.others


class _StatePickler(pickle.Pickler):
    """Pickles as `torch.save` does, and placed tensors as if their elements were here."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, PICKLE_PROTOCOL)
        self.others: dict[str, torch.UntypedStorage] = {}
        self._keys: dict[int, str] = {}

    def reducer_override(self, value: Any) -> Any:
        """How torch would rebuild a placed tensor; everything else as usual."""
        if type(value) is not PlacedTensor:
            return NotImplemented
        rebuild, further = _find_rebuild(value.dtype)
        stride = contiguous_stride(value.shape)
        hooks: OrderedDict[str, Any] = OrderedDict()
        return rebuild, (_PlacedStorage(value), 0, value.shape, stride, False, hooks, *further)

    def persistent_id(self, value: object) -> StorageId | None:
        """The stand-in for a storage in the pickle; None for everything else."""
        if type(value) is _PlacedStorage:
            return value.saved_id()
        storage: Any = value
        if isinstance(value, torch.storage.TypedStorage):
            name, storage, numel = take_apart_typed_storage(value)
            kind: object = getattr(torch, name)
        elif isinstance(value, torch.UntypedStorage):
            kind, numel = torch.UntypedStorage, value.nbytes()
        else:
            return None
        return ("storage", kind, self._other_key(storage), "cpu", numel)

    def _other_key(self, storage: Any) -> str:
        identity = identity_of_storage(storage)
        key = self._keys.get(identity)
        if key is None:
            key = self._keys[identity] = f"value-{len(self.others)}"
            self.others[key] = storage.cpu()
        return key


class _PlacedStorage:
    """The storage of a placed tensor, for the pickler."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: PlacedTensor) -> None:
        self._tensor = tensor

    def saved_id(self) -> StorageId:
        """Its reference in the pickle."""
        tensor = self._tensor
        kind = _storage_class(tensor.dtype)
        numel = tensor.nbytes if kind is torch.UntypedStorage else tensor.numel
        return ("storage", kind, tensor.key, "cpu", numel)


@lru_cache(maxsize=64)
def _find_rebuild(dtype: torch.dtype) -> tuple[Any, tuple[Any, ...]]:
    """torch's function that rebuilds a tensor of this dtype, and its arguments after the hooks."""
    rebuild, arguments = _reduce_empty(dtype)
    return rebuild, arguments[6:]


@lru_cache(maxsize=64)
def _storage_class(dtype: torch.dtype) -> object:
    """The class that torch's pickles name for a storage of this dtype."""
    storage = _reduce_empty(dtype)[1][0]
    if isinstance(storage, torch.UntypedStorage):
        return torch.UntypedStorage
    return getattr(torch, take_apart_typed_storage(storage)[0])


def _reduce_empty(dtype: torch.dtype) -> tuple[Any, tuple[Any, ...]]:
    empty: Any = torch.empty(0, dtype=dtype)
    rebuild, arguments = empty.__reduce_ex__(PICKLE_PROTOCOL)
    return rebuild, arguments


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    content: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return memoryview(content)


def _record(key: str) -> bytes:
    return b"archive/data/" + key.encode()
