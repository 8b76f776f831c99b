"""Locates tensors: the bytes of a tensor's entry -> where its data is.

Opens entries written by torch 2.0 and later: the order, number and alignment of the records and the
archive's name differ between versions, so all are found through the archive's directory.

Rules inside:

- Everything in an entry is untrusted: no number is used before it is checked, and nothing is
  decompressed, executed or unpickled here; `unpickle` reads a tensor's pickle.
- Damage raises `CheckpointCorruptError` with the offset from the entry's start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from pytest_dcp._engine.format.zip_archive import (
    Directory,
    Source,
    ZipRecord,
    content,
    content_offset,
    corrupt,
    read_directory,
)
from pytest_dcp._engine.unpickle import TensorPickle, UnknownGlobalError, read_tensor_pickle
from pytest_dcp._engine.unpickle.opaque_tensors import OpaqueWrapper, read_opaque_pickle
from pytest_dcp.errors import CheckpointCorruptError

_TENSOR_DIRECTORY_LIMIT = 64 << 10
"""Bytes of a tensor's directory; torch's takes about 500."""
_TENSOR_PICKLE_LIMIT = 64 << 10
"""Bytes of a tensor's pickle; torch's takes about 160 and a few for each dimension."""
_BYTEORDER_LIMIT = 16


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Where a tensor's bytes are inside its entry.

    Every element lies inside the record, and the record has room for all elements of the shape, so
    a small entry cannot ask for a large tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    storage_offset: int
    """Offset of the first element from the storage's start, in elements."""
    data_offset: int
    """Offset of the storage from the entry's start, in bytes."""
    data_nbytes: int
    """Of the whole storage."""
    crc: int | None
    """CRC-32 of the whole storage; None if the entry was written without CRCs."""


def locate(read: Callable[[int, int], bytes | memoryview], length: int) -> TensorRecord:
    """Where the data is in a tensor's entry of `length` bytes; `read(offset, n)` gives its bytes.

    Takes two reads of an entry that torch wrote, one if the entry is small. The data need not be
    read, and its CRC is not checked.

    Raises:
        CheckpointCorruptError: the entry is damaged, or holds something other than a tensor.
    """
    source = Source(read, length)
    directory = read_directory(source, _TENSOR_DIRECTORY_LIMIT)
    pickled = content(source, directory, "data.pkl", _TENSOR_PICKLE_LIMIT)
    _check_byteorder(source, directory)
    try:
        tensor = _read_plain(pickled)
    except CheckpointCorruptError as error:
        raise error.at(offset=content_offset(source, directory.record("data.pkl"))) from error
    return _record_of(source, directory, tensor)


def locate_wrapper(
    read: Callable[[int, int], bytes | memoryview], length: int
) -> OpaqueWrapper | None:
    """An entry's description of its tensor wrapper; None if it holds something else.

    Like `locate`. Raises CheckpointCorruptError if the entry is damaged.
    """
    source = Source(read, length)
    directory = read_directory(source, _TENSOR_DIRECTORY_LIMIT)
    pickled = content(source, directory, "data.pkl", _TENSOR_PICKLE_LIMIT)
    try:
        found = read_opaque_pickle(pickled)
    except UnknownGlobalError:
        return None
    return found if isinstance(found, OpaqueWrapper) and found.inner() else None


def _read_plain(pickled: bytes | memoryview) -> TensorPickle:
    """The tensor's description; for a subclass with its own memory, the description of that
    memory."""
    try:
        return read_tensor_pickle(pickled)
    except UnknownGlobalError as error:
        try:
            found = read_opaque_pickle(pickled)
        except UnknownGlobalError:
            raise error from None
        if isinstance(found, OpaqueWrapper):
            raise UnknownGlobalError(
                f"expected a tensor with memory of its own, got a {found.kind}, a wrapper of "
                f"{', '.join(found.inner())}: load it into a tensor of that class"
            ) from None
        if not isinstance(found, TensorPickle):
            raise error from None
        return found


def _record_of(source: Source, directory: Directory, tensor: TensorPickle) -> TensorRecord:
    record = directory.record(f"data/{tensor.storage_key}")
    _check_extent(tensor, record)
    return TensorRecord(
        dtype=tensor.dtype,
        shape=tensor.shape,
        stride=tensor.stride,
        storage_offset=tensor.storage_offset,
        data_offset=content_offset(source, record),
        data_nbytes=record.nbytes,
        crc=record.crc if directory.has_crcs else None,
    )


def _check_byteorder(source: Source, directory: Directory) -> None:
    """Refuses an entry whose record byteorder says big; torch before 2.1 wrote no such record."""
    name = "byteorder"
    if name not in directory.records:
        return
    order = bytes(content(source, directory, name, _BYTEORDER_LIMIT))
    if order != b"little":
        raise corrupt(
            f"expected the record 'byteorder' to hold b'little', got {order!r}: the tensor was "
            "saved on a machine of the other byte order; load it there, or with torch.load, and "
            "save it anew",
            directory.record(name).offset,
        )


def _check_extent(tensor: TensorPickle, record: ZipRecord) -> None:
    """Refuses a tensor whose storage is not the record, or that has more elements than it.

    The reader of the pickle has already checked that the elements lie inside the storage.
    """
    if record.nbytes != tensor.storage_nbytes:
        raise corrupt(
            f"expected a record of {tensor.storage_nbytes} bytes, as data.pkl says, "
            f"got one of {record.nbytes}",
            record.offset,
        )
    first, nbytes = (n * tensor.dtype.itemsize for n in (tensor.storage_offset, prod(tensor.shape)))
    if max(first, nbytes) > record.nbytes:
        raise corrupt(
            f"expected {nbytes} bytes of a tensor from byte {first} on, got a record of "
            f"{record.nbytes}: its elements share places, or it starts behind them",
            record.offset,
        )
