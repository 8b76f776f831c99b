"""Reads the pickle of a plain tensor's entry: into a description, without making the tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from pytest_dcp._engine.unpickle.interpreter import run
from pytest_dcp._engine.unpickle.machine import (
    Callee,
    PickleMachine,
    UnknownGlobalError,
    Vocabulary,
    brief,
)
from pytest_dcp._engine.unpickle.plain_values import MAX_DIMS, PLAIN, ordered_dict
from pytest_dcp.errors import CheckpointCorruptError

_INT64_BOUND = 1 << 63
# Storage classes by dtype: torch/storage.py, _dtype_to_storage_type_map, without the quantized
# ones, whose tensors carry scales that a TensorPickle has no place for.
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorPickle:
    """A tensor's description in its entry's `data.pkl`; its elements lie within its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements; never negative."""
    storage_offset: int
    """In elements, from the start of the storage."""
    storage_key: str
    """The record `data/<key>` of the entry holds the storage."""
    storage_nbytes: int
    """Bytes of the storage, whether the pickle counts them or elements."""
    requires_grad: bool


def read_tensor_pickle(data: bytes | memoryview) -> TensorPickle:
    """The description of the one tensor that the `data.pkl` of an entry of `torch.save` holds.

    Raises:
        UnknownGlobalError: it holds something else: a subclass, a sparse or quantized tensor, one
        with
            its conjugate or negative bit set, several tensors.
        CheckpointCorruptError: the pickle is malformed, or the tensor reaches beyond its storage.
    """
    tensor = run(data, _TENSOR)
    if type(tensor) is not TensorPickle:
        raise UnknownGlobalError(f"expected a pickle of one tensor, got {brief(tensor)}")
    return tensor


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    key: str
    size_bytes: int


def load_storage(saved_id: object) -> _Storage:
    """The storage for a persistent id: ('storage', class, key, location, elements)."""
    if type(saved_id) is not tuple or len(saved_id) != 5 or saved_id[0] != "storage":
        raise UnknownGlobalError(f"expected a reference to a storage, got {brief(saved_id)}")
    _, dtype, key, location, numel = saved_id
    if type(dtype) is not StorageClass:
        raise UnknownGlobalError(f"expected a storage class of torch, got {brief(dtype)}")
    if type(key) is not str or type(location) is not str:
        raise CheckpointCorruptError(
            f"expected a storage's key and location, got {brief(key)} and {brief(location)}"
        )
    itemsize = dtype.dtype.itemsize
    return _Storage(dtype.dtype, key, itemsize * _count(numel, "a storage's elements"))


@dataclass(frozen=True, slots=True)
class StorageClass:
    """The dtype that a storage class of torch stands for."""

    dtype: torch.dtype


def rebuild_tensor(args: tuple[Any, ...]) -> TensorPickle:
    """torch._utils._rebuild_tensor_v2: the storage's class has the dtype."""
    if not 6 <= len(args) <= 7:
        raise CheckpointCorruptError(f"expected 6 or 7 facts of a tensor, got {len(args)}")
    _check_extras(args[5], *args[6:])
    return _describe_tensor(args, None)


def _rebuild_tensor_of_dtype(_: PickleMachine, args: tuple[Any, ...]) -> TensorPickle:
    """torch._utils._rebuild_tensor_v3: the dtype stands by itself."""
    if not 7 <= len(args) <= 8:
        raise CheckpointCorruptError(f"expected 7 or 8 facts of a tensor, got {len(args)}")
    if type(args[6]) is not torch.dtype:
        raise CheckpointCorruptError(f"expected a tensor's dtype, got {brief(args[6])}")
    _check_extras(args[5], *args[7:])
    return _describe_tensor(args, args[6])


def _rebuild_parameter(_: PickleMachine, args: tuple[Any, ...]) -> TensorPickle:
    if len(args) != 3 or type(args[0]) is not TensorPickle or type(args[1]) is not bool:
        raise UnknownGlobalError(
            "expected a parameter over one tensor, got one over something else"
        )
    _check_extras(args[2])
    return replace(args[0], requires_grad=args[1])


def _check_extras(hooks: object, metadata: object = None) -> None:
    """Refuse a tensor with hooks, or with bits in its metadata (conjugate, negative)."""
    if type(hooks) is not OrderedDict or hooks or (metadata is not None and metadata != {}):
        raise UnknownGlobalError(
            "expected a tensor without hooks, conjugate or negative bit, got one with them"
        )


def _describe_tensor(args: tuple[Any, ...], dtype: torch.dtype | None) -> TensorPickle:
    storage = args[0]
    if type(storage) is not _Storage:
        raise CheckpointCorruptError(f"expected a tensor's storage, got {brief(storage)}")
    return describe_tensor(dtype or storage.dtype, storage.key, storage.size_bytes, args[1:5])


def describe_tensor(
    dtype: torch.dtype, storage_key: str, storage_nbytes: int, facts: tuple[Any, ...]
) -> TensorPickle:
    """A tensor over a storage, from its offset, shape, stride and requires_grad, all unchecked.

    Raises:
        CheckpointCorruptError: they are malformed, or reach beyond the storage.
    """
    offset, shape, stride, requires_grad = facts
    if type(requires_grad) is not bool:
        raise CheckpointCorruptError(f"expected requires_grad, got {brief(requires_grad)}")
    tensor = TensorPickle(
        dtype=dtype,
        shape=_counts(shape, "a tensor's shape"),
        stride=_counts(stride, "a tensor's stride"),
        storage_offset=_count(offset, "a tensor's storage offset"),
        storage_key=storage_key,
        storage_nbytes=storage_nbytes,
        requires_grad=requires_grad,
    )
    _check_within_storage(tensor)
    return tensor


def _check_within_storage(tensor: TensorPickle) -> None:
    if len(tensor.shape) != len(tensor.stride):
        raise CheckpointCorruptError(
            f"expected a stride for each dimension, got {len(tensor.shape)} dimensions and "
            f"{len(tensor.stride)} strides"
        )
    if 0 in tensor.shape:
        return
    steps = zip(tensor.shape, tensor.stride, strict=True)
    last = tensor.storage_offset + sum((size - 1) * stride for size, stride in steps)
    needed = (last + 1) * tensor.dtype.itemsize
    if needed > tensor.storage_nbytes:
        raise CheckpointCorruptError(
            f"expected a tensor within its storage of {tensor.storage_nbytes} bytes, got one that "
            f"ends at byte {brief(needed)}"
        )


def _counts(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS:
        raise CheckpointCorruptError(f"expected {what} of at most {MAX_DIMS}, got {brief(value)}")
    return tuple(_count(item, what) for item in value)


def _count(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < _INT64_BOUND:
        raise CheckpointCorruptError(
            f"expected {what} as an int from 0 to 2**63 - 1, got {brief(value)}"
        )
    return value


def _tensor_globals() -> Iterator[tuple[tuple[str, str], object]]:
    for key, value in PLAIN.globals.items():
        if isinstance(value, torch.dtype) or key == ("torch", "Size"):
            yield key, value
    yield ("collections", "OrderedDict"), Callee("collections.OrderedDict", ordered_dict)
    for name, call in (
        ("_rebuild_tensor_v2", lambda _, args: rebuild_tensor(args)),
        ("_rebuild_tensor_v3", _rebuild_tensor_of_dtype),
        ("_rebuild_parameter", _rebuild_parameter),
    ):
        yield ("torch._utils", name), Callee(f"torch._utils.{name}", call)
    for storage, dtype in STORAGE_DTYPES.items():
        for module in ("torch", "torch.storage"):
            yield (module, storage), StorageClass(dtype)


_TENSOR = Vocabulary(globals=dict(_tensor_globals()), build={}, persistent=load_storage)


def tensor_vocabulary() -> Vocabulary:
    """Globals that the pickle of a tensor's entry may name, for readers that support more."""
    return _TENSOR
