"""The entry of a wrapper subclass or a quantised tensor -> into the tensor that is loaded to.

Nothing of the checkpoint's classes is imported or run: the target says by `__tensor_flatten__`
which inner tensors it has, and each gets the values that the entry has for it. What else the entry
says of the tensor must be what the target says. Everything is compared before anything is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pytest_dcp.checkpoint.plan.opaque import STORED_DTYPES
from pytest_dcp.checkpoint.store.entry import records_of
from pytest_dcp.checkpoint.store.unpickle import TensorPickle, UnknownGlobalError
from pytest_dcp.checkpoint.store.unpickle_opaque import (
    OpaquePickle,
    OpaqueWrapper,
    QuantisedPickle,
    read_opaque_pickle,
)
from pytest_dcp.checkpoint.store.wrapper_attributes import require_same_attributes
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

Storage = Callable[[str], bytes | memoryview]
Copy = tuple[torch.Tensor, torch.Tensor]
"""Where to, and what."""


def fill_opaque(fqn: str, target: torch.Tensor, entry: bytes | memoryview) -> torch.Tensor:
    """The opaque tensor, with the values of an entry.

    A new one where the target is quantised and has no scales yet, as an empty tensor of such a
    dtype: it cannot be given any. Raises CheckpointMismatchError, naming the key, where the entry
    holds another kind of tensor; CheckpointCorruptError where it is damaged.
    """
    try:
        stored, storage = _opened(entry)
        if _lacks_scales(target) and isinstance(stored, QuantisedPickle):
            return _tensor(stored, storage)
        copies = _copies(fqn, target, stored, storage)
    except CheckpointCorruptError as error:
        raise error.at(entry=fqn) from error
    with torch.no_grad():
        for to, value in copies:
            to.copy_(value)
    return target


def read_quantised(entry: bytes | memoryview) -> torch.Tensor | None:
    """The quantised tensor of an entry; None where it holds something else.

    Raises CheckpointCorruptError for a damaged one.
    """
    try:
        stored, storage = _opened(entry)
    except UnknownGlobalError:
        return None
    return _tensor(stored, storage) if isinstance(stored, QuantisedPickle) else None


def wrapper_in(entry: bytes | memoryview) -> str | None:
    """The class and size of the wrapper subclass of an entry, in words; None for anything else."""
    try:
        stored, _ = _opened(entry)
    except CheckpointCorruptError:
        return None
    if not isinstance(stored, OpaqueWrapper):
        return None
    return f"a {stored.kind} of size {tuple(stored.shape)}"


def _opened(entry: bytes | memoryview) -> tuple[OpaquePickle, Storage]:
    """What an entry says of its tensor, and what gives the bytes of a storage by its key."""
    read = records_of(entry)
    stored = read_opaque_pickle(read("data.pkl"))
    return stored, lambda key: read(f"data/{key}")


def _lacks_scales(target: torch.Tensor) -> bool:
    if not target.is_quantized:
        return False
    try:
        target.qscheme()
    except RuntimeError:  # What torch says of one whose quantiser is unknown.
        return True
    return False


def _copies(fqn: str, target: Any, stored: OpaquePickle, storage: Storage) -> list[Copy]:
    """What has to be copied where."""
    if isinstance(stored, OpaqueWrapper):
        return _inner_copies(fqn, target, stored, storage)
    shape = stored.shape if isinstance(stored, TensorPickle) else stored.data.shape
    if hasattr(target, "__tensor_flatten__") or tuple(target.shape) != shape:
        raise _mismatch(fqn, f"a tensor of size {shape}", _told(target))
    value = _tensor(stored, storage)
    if value.dtype != target.dtype:
        raise _mismatch(fqn, f"{value.dtype}", f"{target.dtype}")
    if value.is_quantized and value.qscheme() != target.qscheme():
        raise _mismatch(fqn, f"{value.qscheme()}", f"{target.qscheme()}")
    return [(target, value)]


def _inner_copies(fqn: str, target: Any, stored: OpaqueWrapper, storage: Storage) -> list[Copy]:
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    if stored.kind != kind or tuple(target.shape) != tuple(stored.shape):
        raise _mismatch(fqn, f"a {stored.kind} of size {tuple(stored.shape)}", _told(target))
    names, _ = target.__tensor_flatten__()
    copies: list[Copy] = []
    for name in names:
        part = stored.state.get(name)
        if not isinstance(part, OpaquePickle):
            raise _mismatch(f"{fqn}.{name}", "no tensor of this name", _told(target))
        copies += _copies(f"{fqn}.{name}", getattr(target, name), part, storage)
    require_same_attributes(fqn, target, stored.state, names)
    return copies


def _tensor(stored: TensorPickle | QuantisedPickle, storage: Storage) -> torch.Tensor:
    if isinstance(stored, TensorPickle):
        return _plain(stored, storage, stored.dtype)
    whole = _plain(stored.data, storage, _integers_of(stored.data.dtype)).contiguous()
    match stored.scheme, stored.parameters:
        case torch.per_tensor_affine, (float(scale), int(zero)):
            return torch._make_per_tensor_quantized_tensor(whole, scale, zero)
        case (
            torch.per_channel_affine | torch.per_channel_affine_float_qparams,
            (TensorPickle() as scales, TensorPickle() as zeros, int(axis)),
        ):
            sizes = {scales.shape, zeros.shape, whole.shape[axis : axis + 1]}
            if 0 <= axis < whole.ndim and len(sizes) == 1:
                of_scales = _plain(scales, storage, scales.dtype)
                of_zeros = _plain(zeros, storage, zeros.dtype)
                return torch._make_per_channel_quantized_tensor(whole, of_scales, of_zeros, axis)
    raise CheckpointCorruptError(
        f"expected scales that belong to a quantised tensor of size {tuple(whole.shape)}, got "
        f"{stored.scheme} with {stored.parameters!r:.200}"
    )


def _integers_of(dtype: torch.dtype) -> torch.dtype:
    integers = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}
    if dtype not in integers:
        raise CheckpointCorruptError(f"expected a quantised dtype of whole bytes, got {dtype}")
    return integers[dtype]


def _plain(stored: TensorPickle, storage: Storage, dtype: torch.dtype) -> torch.Tensor:
    data = storage(stored.storage_key)
    if len(data) != stored.storage_nbytes:
        raise CheckpointCorruptError(
            f"expected a storage of {stored.storage_nbytes} bytes, got one of {len(data)}"
        )
    if dtype not in STORED_DTYPES:
        raise CheckpointCorruptError(f"expected a dtype of plain elements, got {dtype}")
    usable = len(data) // dtype.itemsize * dtype.itemsize
    flat = torch.from_numpy(np.frombuffer(data, np.uint8)[:usable].copy()).view(dtype)
    return flat.as_strided(stored.shape, stored.stride, stored.storage_offset)


def _told(target: Any) -> str:
    return f"a {type(target).__name__} of size {tuple(target.shape)}"


def _mismatch(fqn: str, there: str, here: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{fqn!r} is {there} in the checkpoint, and {here} here", mismatched=(fqn,)
    )
