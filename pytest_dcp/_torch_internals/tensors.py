"""Tensors that are more than their memory: wrappers, fakes, quantised ones, lazy bits."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # The first two are behind torch's own unpickling of quantised tensors: a file has the integers,
    # scales and zero points apart, and in public there is only quantising of floats. They can go
    # with quantised tensors, which torch has deprecated. The third sets a lazy bit that a stored
    # tensor's metadata names, as `tensor.conj()` does for the other one; it can go when it is
    # public too.
    from torch import (
        _make_per_channel_quantized_tensor,
        _make_per_tensor_quantized_tensor,
        _neg_view,
    )

    # A tensor without memory must not be saved as if it had some. Can go when torch has a public
    # test for fake tensors.
    from torch._subclasses.fake_tensor import FakeTensor

    # Subclasses that hold other tensors, by the protocol of `__tensor_flatten__`. Documented for
    # authors of subclasses, but in a private module; can go when it moves to a public one.
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

TORCH.require_attributes(torch.UntypedStorage, "_cdata")

__all__ = [
    "FakeTensor",
    "identity_of_storage",
    "is_traceable_wrapper_subclass",
    "make_quantised_by_channel",
    "make_quantised_by_tensor",
    "make_typed_storage",
    "parts_of_sparse",
    "set_negative_bit",
    "take_apart_typed_storage",
]


identity_of_storage: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""A number that two Python objects share where they are one storage.

`data_ptr()` is 0 for every empty storage. Can go when storages compare equal.
"""


def take_apart_typed_storage(typed: Any) -> tuple[str, torch.UntypedStorage, int]:
    """Of a `torch.storage.TypedStorage`: its class's old name, its memory, its number of elements.

    In public, all three warn that the class is to go. Can go with the class.
    """
    return typed._pickle_storage_type(), typed._untyped_storage, typed._size()


def make_typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    """The storage as an argument of torch's functions that rebuild tensors.

    In public, the class warns that it is to go. Can go with the class.
    """
    typed: Any = torch.storage.TypedStorage
    return typed(wrap_storage=storage, dtype=dtype, _internal=True)


def make_quantised_by_tensor(whole: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """A quantised tensor of these integers, with one scale and zero point for all."""
    return _make_per_tensor_quantized_tensor(whole, scale, zero)


def make_quantised_by_channel(
    whole: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, axis: int
) -> torch.Tensor:
    """A quantised tensor of these integers, with a scale and a zero point along an axis."""
    return _make_per_channel_quantized_tensor(whole, scales, zeros, axis)


def parts_of_sparse(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices and values of a sparse tensor in coordinates, as they are stored.

    In public, only those of a coalesced one are given. Can go when all are.
    """
    return tensor._indices(), tensor._values()


def set_negative_bit(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor that counts as the negative of its memory."""
    return _neg_view(tensor)
