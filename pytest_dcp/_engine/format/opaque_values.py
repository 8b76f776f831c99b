"""The entry of a wrapper subclass or a quantised tensor -> into the tensor that is loaded to.

The checkpoint's classes are neither imported nor run: the target lists its inner tensors by
`__tensor_flatten__`, and each gets the values that the entry has for it. The tensor's other
attributes in the entry must equal the target's. First everything is compared, which does not need
the bytes of the tensors; then all tensors are made; then they are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.entry import records_of
from pytest_dcp._engine.format.wrapper_attributes import require_same_attributes
from pytest_dcp._engine.plan.opaque import STORED_DTYPES
from pytest_dcp._engine.unpickle import TensorPickle, UnknownGlobalError
from pytest_dcp._engine.unpickle.opaque_tensors import (
    OpaquePickle,
    OpaqueWrapper,
    QuantisedPickle,
    read_opaque_pickle,
)
from pytest_dcp._torch_internals.tensors import (
    is_traceable_wrapper_subclass,
    make_quantised_by_channel,
    make_quantised_by_tensor,
)
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

Storage = Callable[[str], bytes | memoryview]
"""The bytes of a storage, by its key."""
Stored = TensorPickle | QuantisedPickle
Copy = tuple[torch.Tensor, Stored]
"""Where to, and what."""


def prepare_opaque(
    fqn: str, target: torch.Tensor, entry: bytes | memoryview
) -> Callable[[], torch.Tensor]:
    """A function that gives the opaque tensor with the values of an entry that fits."""
    try:
        stored, storage = open_wrapper(entry)
        if _lacks_scales(target) and isinstance(stored, QuantisedPickle):
            return lambda: make_tensor(stored, storage)
        copies = _copies(fqn, target, stored, same_class=True)
    except CheckpointCorruptError as error:
        raise error.at(entry=fqn) from error

    def put() -> torch.Tensor:
        try:
            _copy(copies, storage)
        except CheckpointCorruptError as error:
            raise error.at(entry=fqn) from error
        return target

    return put


def check_wrapper(fqn: str, target: torch.Tensor, stored: OpaqueWrapper) -> list[Copy]:
    """The copies from a wrapper that torch wrote into the tensors within the target.

    The target may be of another class if its inner tensors have the same names. Raises
    CheckpointMismatchError, naming the key, if the stored wrapper does not fit.
    """
    return _copies(fqn, target, stored, same_class=False)


def fill_wrapper(copies: Sequence[Copy], entry: bytes | memoryview) -> None:
    """Copy the tensors of a whole entry to the places that `check_wrapper` found.

    Raises CheckpointCorruptError, before anything is copied, for a damaged entry.
    """
    read = records_of(entry)
    _copy(copies, lambda key: read(f"data/{key}"))


def _copy(copies: Sequence[Copy], storage: Storage) -> None:
    values = [(target, make_tensor(stored, storage)) for target, stored in copies]
    with torch.no_grad():
        for target, value in values:
            target.copy_(value)


def read_quantised(entry: bytes | memoryview) -> torch.Tensor | None:
    """The quantised tensor of an entry; None where it holds something else.

    Raises CheckpointCorruptError for a damaged one.
    """
    try:
        stored, storage = open_wrapper(entry)
    except UnknownGlobalError:
        return None
    return make_tensor(stored, storage) if isinstance(stored, QuantisedPickle) else None


def wrapper_in(entry: bytes | memoryview) -> str | None:
    """The class and size of the wrapper subclass of an entry, in words; None for anything else."""
    try:
        stored, _ = open_wrapper(entry)
    except CheckpointCorruptError:
        return None
    if not isinstance(stored, OpaqueWrapper):
        return None
    return f"a {stored.kind} of size {tuple(stored.shape)}"


def open_wrapper(entry: bytes | memoryview) -> tuple[OpaquePickle, Storage]:
    """An entry's description of its tensor, and a function that gives a storage's bytes by key."""
    read = records_of(entry)
    stored = read_opaque_pickle(read("data.pkl"))
    return stored, lambda key: read(f"data/{key}")


def _lacks_scales(target: torch.Tensor) -> bool:
    if not target.is_quantized:
        return False
    try:
        target.qscheme()
    except RuntimeError:  # torch's description of a tensor with an unknown quantiser.
        return True
    return False


def _copies(fqn: str, target: Any, stored: OpaquePickle, *, same_class: bool) -> list[Copy]:
    """One copy to be made: source and destination."""
    if isinstance(stored, OpaqueWrapper):
        return _inner_copies(fqn, target, stored, same_class=same_class)
    data = stored if isinstance(stored, TensorPickle) else stored.data
    if is_traceable_wrapper_subclass(target) or tuple(target.shape) != data.shape:
        raise misfit(fqn, f"a tensor of size {data.shape}", describe_target(target))
    floats = data.dtype.is_floating_point and target.dtype.is_floating_point
    if data.dtype != target.dtype and not floats:
        raise misfit(fqn, f"{data.dtype}", f"{target.dtype}")
    if isinstance(stored, QuantisedPickle):
        _scales_of(stored)
        if stored.scheme != target.qscheme():
            raise misfit(fqn, f"{stored.scheme}", f"{target.qscheme()}")
    return [(target, stored)]


def _inner_copies(fqn: str, target: Any, stored: OpaqueWrapper, *, same_class: bool) -> list[Copy]:
    names = target.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(target) else ()
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    other = stored.kind != kind if same_class else not names
    if other or tuple(target.shape) != stored.shape:
        there = f"a {stored.kind} of size {stored.shape}, a wrapper of {', '.join(stored.inner())},"
        raise misfit(fqn, there, describe_target(target))
    for name in stored.inner().keys() - set(names):
        # The class keeps it besides the attributes that are compared, or it is lost.
        if not isinstance(getattr(target, name, None), torch.Tensor):
            raise misfit(f"{fqn}.{name}", "a tensor", "no tensor of this name")
    copies: list[Copy] = []
    for name in names:
        part = stored.state.get(name)
        if not isinstance(part, OpaquePickle):
            raise misfit(f"{fqn}.{name}", "no tensor of this name", describe_target(target))
        inner = getattr(target, name)
        copies += _copies(f"{fqn}.{name}", inner, part, same_class=same_class)
    require_same_attributes(fqn, target, stored.state, names)
    return copies


def make_tensor(stored: Stored, storage: Storage) -> torch.Tensor:
    """The tensor that an entry describes, in memory of its own.

    Raises CheckpointCorruptError for a damaged storage, or scales that do not fit.
    """
    if isinstance(stored, TensorPickle):
        return storage_tensor(stored, storage)
    scales, zeros, *axis = _scales_of(stored)
    whole = _plain(stored.data, storage, _integers_of(stored.data.dtype)).contiguous()
    if not axis:
        return make_quantised_by_tensor(whole, scales, zeros)
    of_scales = _plain(scales, storage, scales.dtype)
    of_zeros = _plain(zeros, storage, zeros.dtype)
    return make_quantised_by_channel(whole, of_scales, of_zeros, *axis)


def _scales_of(stored: QuantisedPickle) -> tuple[Any, ...]:
    """Scale and zero point; or, by channel, TensorPickles of them, and the axis."""
    shape = stored.data.shape
    match stored.scheme, stored.parameters:
        case torch.per_tensor_affine, (float(), int()):
            return stored.parameters
        case (
            torch.per_channel_affine | torch.per_channel_affine_float_qparams,
            (TensorPickle() as scales, TensorPickle() as zeros, int(axis)),
        ):
            sizes = {scales.shape, zeros.shape, shape[axis : axis + 1]}
            if 0 <= axis < len(shape) and len(sizes) == 1:
                return stored.parameters
    raise CheckpointCorruptError(
        f"expected scales for a quantised tensor of size {shape}, got "
        f"{stored.scheme} with {stored.parameters!r:.200}"
    )


def _integers_of(dtype: torch.dtype) -> torch.dtype:
    integers = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}
    if dtype not in integers:
        raise CheckpointCorruptError(f"expected a quantised dtype of whole bytes, got {dtype}")
    return integers[dtype]


def storage_tensor(stored: TensorPickle, storage: Storage) -> torch.Tensor:
    """The tensor of plain elements that an entry describes, in memory of its own.

    Raises CheckpointCorruptError for a damaged storage, or another dtype.
    """
    return _plain(stored, storage, stored.dtype)


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


def describe_target(target: Any) -> str:
    """A tensor's class and size, in words."""
    return f"a {type(target).__name__} of size {tuple(target.shape)}"


def misfit(fqn: str, there: str, here: str) -> CheckpointMismatchError:
    """The error for a key that is one thing in the checkpoint, and another here."""
    return CheckpointMismatchError(
        f"{fqn!r} is {there} in the checkpoint, and {here} here", mismatched=(fqn,)
    )
