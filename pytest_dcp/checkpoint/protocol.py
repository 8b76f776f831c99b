"""Attributes by which a plain tensor describes its boxes: the names of
`torch.distributed.checkpoint.protocol`.

Torch has the module since 2.14; before that the class is defined here. Tensors that keep to it are
saved and loaded with any torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = ["CheckpointableTensor"]


@runtime_checkable
class CheckpointableTensor(Protocol):
    """A local tensor that holds boxes of a larger, global one, and says so by these attributes.

    The tensor need not be wrapped or subclassed: setting `tensor.global_shape = (8, 4)` is enough.
    The last three have one member per box.
    """

    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    global_offsets: tuple[tuple[int, ...], ...]
    """Where each box begins in the whole tensor."""
    local_offsets: tuple[tuple[int, ...], ...]
    """Where each box begins in this tensor, which may also hold other elements."""
    local_sizes: tuple[tuple[int, ...], ...]
    """The shape of each box."""


try:
    torchs_own: Any = importlib.import_module("torch.distributed.checkpoint.protocol")
except ImportError:
    pass
else:
    CheckpointableTensor = torchs_own.CheckpointableTensor  # type: ignore[misc]  # same class

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
