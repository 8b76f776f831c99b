"""A value whose tensors have no memory -> the same value with their elements.

The value is pickled in memory, where each tensor is a number, and unpickled with other tensors in
their places. So every class is rebuilt as it was made: by its own pickle.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.python_values import ERRORS_OF_CLASSES, INERT_LEAVES, LEAVES
from pytest_dcp._engine.plan.shards import PLAIN as PLAIN_TENSORS
from pytest_dcp._torch_internals.tensors import parts_of_sparse, set_negative_bit
from pytest_dcp.errors import CheckpointCorruptError

PROTOCOL = 5
"""With buffers that are not copied: arrays may be large."""
Read = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Gives plain strided tensors without memory their elements; several at once."""


def replace_tensors(value: Any, read: Read) -> Any:
    """The value with its tensors read; the same object if it has none.

    Raises CheckpointCorruptError if it cannot be made again.
    """
    if type(value) in LEAVES or type(value) in INERT_LEAVES or type(value) is np.ndarray:
        return value
    if isinstance(value, torch.Tensor) and value.is_quantized:
        return value
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = _TensorPickler(stream, buffers)
    try:
        pickler.dump(value)
        if not pickler.found:
            return value
        places = [_TensorToRead.of(tensor) for tensor in pickler.found]
        parts = iter(read([part for place in places for part in place.parts]))
        filled = [place.make([next(parts) for _ in place.parts]) for place in places]
        stream.seek(0)
        return _TensorUnpickler(stream, buffers, filled).load()
    except (*ERRORS_OF_CLASSES, pickle.PickleError) as error:
        raise CheckpointCorruptError(f"the value cannot be made: {error!r:.200}") from error


class _TensorPickler(pickle.Pickler):
    """Writes a number for each tensor without memory."""

    def __init__(self, stream: io.BytesIO, buffers: list[pickle.PickleBuffer]) -> None:
        super().__init__(stream, PROTOCOL, buffer_callback=buffers.append)
        self.found: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The number of a tensor."""
        if type(value) not in PLAIN_TENSORS or not value.is_meta:
            return None
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.found)
            self.found.append(value)
        return number


class _TensorUnpickler(pickle.Unpickler):
    """Puts the tensors in their places."""

    def __init__(
        self,
        stream: io.BytesIO,
        buffers: list[pickle.PickleBuffer],
        tensors: list[torch.Tensor],
    ) -> None:
        super().__init__(stream, buffers=buffers)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Any:
        """The tensor of this number."""
        return self._tensors[number]


class _TensorToRead:
    """A tensor to be read: itself, or the two tensors that a sparse one consists of."""

    def __init__(self, tensor: torch.Tensor, parts: list[torch.Tensor]) -> None:
        self._tensor = tensor
        self.parts = parts

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _TensorToRead:
        """Its parts are plain strided tensors."""
        plain = tensor.detach()
        if plain.layout is torch.sparse_coo:
            return cls(tensor, list(parts_of_sparse(plain)))
        return cls(tensor, [plain])

    def make(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The tensor, of parts with memory."""
        tensor = self._tensor
        found = parts[0]
        if tensor.layout is torch.sparse_coo:
            found = torch.sparse_coo_tensor(
                parts[0],
                parts[1],
                tensor.shape,
                check_invariants=True,
                is_coalesced=tensor.is_coalesced(),
            )
        found = found.conj() if tensor.is_conj() else found
        found = set_negative_bit(found) if tensor.is_neg() else found
        if type(tensor) is torch.nn.Parameter:
            return torch.nn.Parameter(found, requires_grad=tensor.requires_grad)
        return found.requires_grad_(tensor.requires_grad)
