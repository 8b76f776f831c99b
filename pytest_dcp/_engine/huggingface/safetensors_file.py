"""An open safetensors file, for code written for `safetensors.safe_open`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pytest_dcp._engine.format.memory_limit import MemoryLimit
from pytest_dcp._engine.format.safetensors_header import NAMES, StoredTensor
from pytest_dcp._engine.huggingface.stored_parts import parts_of
from pytest_dcp._engine.io.disk import In
from pytest_dcp._engine.io.read_safetensors import read_header
from pytest_dcp.errors import CheckpointCorruptError


class SafetensorsFile:
    """Tensors by name, whole or in slices; only the rows that a slice needs are read."""

    def __init__(
        self, file: In, name: str, limit: MemoryLimit, advance: Callable[[int], None]
    ) -> None:
        """advance: called with the bytes of each read."""
        self._file = file
        self._name = name
        self._advance = advance
        self._header = read_header(file, name, limit)
        self._tensors = {tensor.name: tensor for tensor in self._header.tensors}
        # A second part of a tensor has its own name in the file.
        self._tensors |= {p.fqn: p.tensor for p in parts_of(name, self._header, limit)}

    def keys(self) -> list[str]:
        """The tensors' names."""
        return [tensor.name for tensor in self._header.tensors]

    def metadata(self) -> Mapping[str, str]:
        """The file's further metadata."""
        return self._header.metadata

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor, to be indexed. Raises CheckpointCorruptError if the file lacks it."""
        if name not in self._tensors:
            raise CheckpointCorruptError("the file has no such tensor", file=self._name, entry=name)
        return TensorSlice(self, self._tensors[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        """The whole tensor. Raises CheckpointCorruptError if the file lacks it."""
        return self.get_slice(name)[()]

    def read(self, tensor: StoredTensor, start: int, nbytes: int) -> torch.Tensor:
        """Elements of a tensor, flat, starting at this byte of its data."""
        data = bytearray(nbytes)
        at = self._header.data_start + tensor.start + start
        if self._file.read_into(at, memoryview(data)) != nbytes:
            raise CheckpointCorruptError(
                "the file ends before the tensor", file=self._name, entry=tensor.name, offset=at
            )
        self._advance(nbytes)
        if not nbytes:
            return torch.empty(0, dtype=tensor.dtype)
        return torch.frombuffer(data, dtype=tensor.dtype)


class TensorSlice:
    """A stored tensor that is read when it is indexed."""

    def __init__(self, file: SafetensorsFile, tensor: StoredTensor) -> None:
        self._file = file
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """The stored tensor's sizes."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """The format's name for its dtype."""
        return NAMES[self._tensor.dtype]

    def __getitem__(self, key: Any) -> torch.Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        shape = self._tensor.shape
        low, high, step = 0, 1, 0
        if shape and keys and isinstance(keys[0], slice):
            low, high, step = keys[0].indices(shape[0])
        if step != 1:
            return self._file.read(self._tensor, 0, self._tensor.nbytes).view(shape)[keys]
        high = max(low, high)
        each = self._tensor.nbytes // max(1, shape[0])
        rows = self._file.read(self._tensor, low * each, (high - low) * each)
        return rows.view(high - low, *shape[1:])[(slice(None), *keys[1:])]
