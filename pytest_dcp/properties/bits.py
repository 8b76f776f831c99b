"""Tensors as their bits. Pure (no I/O).

Enters: tensors of any dtype and strides. Leaves: numpy arrays of bytes with one more dimension, the
bytes of an element. Comparing them distinguishes -0.0 from 0.0, and NaNs with different payloads.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Bits = npt.NDArray[np.uint8]
"""Shape: the tensor's, followed by the bytes of one element in memory order."""

Memory = Literal["contiguous", "offset", "transposed", "stepped"]
"""Layout of a tensor in its storage.

contiguous: alone; offset: a contiguous part of a larger storage; transposed: first dimension
fastest; stepped: two elements from one to the next.
"""

GAP = 0xA5
"""Fills the bytes of a storage that no element covers: a write there can be seen."""


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own memory as bytes, one more dimension; writing to it writes to the tensor."""
    tensor = tensor.detach()
    return tensor.unsqueeze(-1).view(torch.uint8) if tensor.dim() else _scalar_memory(tensor)


def _scalar_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(1).view(torch.uint8)


def bits_of(tensor: torch.Tensor) -> Bits:
    """A copy of the tensor's bits."""
    copied: Bits = memory_of(tensor).cpu().numpy().copy()
    return copied


def flip(tensor: torch.Tensor) -> None:
    """Invert every bit in place, so that no element keeps its value; a bool is negated."""
    memory = memory_of(tensor)
    memory.bitwise_xor_(1 if tensor.dtype == torch.bool else 0xFF)


def tensor_of(bits: Bits, dtype: torch.dtype, memory: Memory = "contiguous") -> torch.Tensor:
    """A CPU tensor with these bits and the requested memory layout."""
    shape = bits.shape[:-1]
    strides, start, length = _lay_out(shape, memory)
    storage = np.full((length, dtype.itemsize), GAP, dtype=np.uint8)
    if dtype == torch.bool:
        storage &= 1
    places = np.lib.stride_tricks.as_strided(
        storage[start:],
        shape=bits.shape,
        strides=(*(step * dtype.itemsize for step in strides), 1),
    )
    if bits.size:
        places[...] = bits
    return torch.from_numpy(storage.reshape(-1)).view(dtype).as_strided(shape, strides, start)


def _lay_out(shape: tuple[int, ...], memory: Memory) -> tuple[tuple[int, ...], int, int]:
    """Strides, first element and length of the storage, in elements."""
    step = 2 if memory == "stepped" else 1
    sides = shape if memory == "transposed" else shape[::-1]
    strides = []
    for side in sides:
        strides.append(step)
        step *= max(side, 1)
    if memory != "transposed":
        strides.reverse()
    before, after = (3, 2) if memory == "offset" else (0, 0)
    return tuple(strides), before, before + step + after
