"""Tensors as bytes, copied only where necessary.

Everything that touches a raw pointer is here. A view keeps nothing alive: the caller
holds on to the tensor while it is used.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator

import torch

from pytest_dcp._engine.plan.boxes import Ints

_READ, _WRITE = 0x100, 0x200
"""PyBUF_READ and PyBUF_WRITE of CPython's C API."""

_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view.restype = ctypes.py_object
_everything: memoryview = _view(1, sys.maxsize - 1, _WRITE)
"""All addresses but 0: slicing a view out of it takes 100 ns, making a new one 500."""


def memory_at(address: int, nbytes: int) -> memoryview:
    """These bytes of this process, writable. The caller keeps their owner alive."""
    if not nbytes:
        return memoryview(bytearray())
    if address <= 0:
        raise ValueError(f"{nbytes} bytes at address {address}: there is no memory")
    return _everything[address - 1 : address - 1 + nbytes]


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense row-major CPU tensor, writable. The caller keeps the tensor alive."""
    return memory_at(tensor.data_ptr(), tensor.nbytes)


def is_flat(tensor: torch.Tensor) -> bool:
    """Whether the tensor's values lie in CPU memory in row-major order without gaps."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def pieces(tensor: torch.Tensor, nbytes: int) -> Iterator[memoryview]:
    """The tensor's values in row-major order, as views of at most about `nbytes`.

    A flat tensor is viewed in place. Any other is copied to flat CPU memory piece by piece: a view
    is valid until the next is requested, and at most `nbytes`, but at least one element, is held at
    a time.
    """
    if is_flat(tensor):
        whole = memory_of(tensor)
        for start in range(0, len(whole), nbytes):
            yield whole[start : start + nbytes]
        return
    for part in _parts(tensor.detach(), nbytes):
        flat = part.resolve_conj().resolve_neg().cpu().contiguous()
        yield memory_of(flat)


def _parts(tensor: torch.Tensor, nbytes: int) -> Iterator[torch.Tensor]:
    """Slices of the tensor, in row-major order, of at most about `nbytes`."""
    size = tensor.numel() * tensor.itemsize
    if size <= nbytes or tensor.dim() == 0:
        if size:
            yield tensor
        return
    if tensor.size(0) == 1:
        yield from _parts(tensor[0], nbytes)
        return
    step = max(1, tensor.size(0) * nbytes // size)
    for start in range(0, tensor.size(0), step):
        yield from _parts(tensor.narrow(0, start, min(step, tensor.size(0) - start)), nbytes)


def strided_tensor(
    buffer: memoryview, dtype: torch.dtype, shape: Ints, stride: Ints
) -> torch.Tensor:
    """The elements of a buffer that lie at these strides (in elements), as a tensor over it.

    The buffer starts at the first element and ends at or after the last.
    """
    count = math.prod(shape.tolist())
    if not count:
        return torch.empty(shape.tolist(), dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=dtype, count=len(buffer) // dtype.itemsize)
    return flat.as_strided(shape.tolist(), stride.tolist())
