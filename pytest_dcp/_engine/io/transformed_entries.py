"""Entries that passed through stream transforms (compression): decoded whole, in bounds, then cut
to the part to load.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import IO

import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.entry_locator import TensorRecord, locate
from pytest_dcp._engine.plan.columns import size_of
from pytest_dcp._torch_internals.checkpoint_classes import (
    ExtensionRegistry,
    StreamTransformExtension,
)
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

ROOM_BYTES = 1 << 20
"""Memory that an entry may take besides a tensor's data."""


def plain_entry(
    stored: bytes | memoryview,
    catalog: Catalog,
    row: int,
    registry: ExtensionRegistry,
    value_bytes: int,
) -> bytes | memoryview:
    """The entry with its transforms undone; unchanged if it had none.

    Raises CheckpointCorruptError if it exceeds its tensor's size, or a value exceeds `value_bytes`.
    """
    descriptors = catalog.places.transforms.get(row)
    if not descriptors:
        return stored
    fqn = catalog.index.fqns[catalog.index.key_of[row]]
    try:
        extensions = registry.from_descriptor_list(list(descriptors))
    except ValueError as error:
        raise CheckpointError(
            f"{fqn!r} was written through {list(descriptors)}, of which something is not known "
            f"here: give the reader a registry that has it ({error})"
        ) from error
    stream: IO[bytes] = io.BytesIO(stored)
    limit = _limit(catalog, row, value_bytes)
    try:
        for extension in extensions:
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        entry = read_at_most(stream, limit + 1)
    except Exception as error:
        # A codec may raise any exception.
        raise CheckpointCorruptError(
            f"the entry cannot be decoded by {list(descriptors)}: {error}", entry=fqn
        ) from error
    if len(entry) > limit:
        raise CheckpointCorruptError(
            f"the entry, of {len(stored)} bytes, grows past {limit} when it is decoded: a tensor "
            "is never so large, and for values that you trust raise max_decoded_bytes of the "
            "storage reader",
            entry=fqn,
        )
    return entry


def tensor_part(
    entry: bytes | memoryview,
    catalog: Catalog,
    row: int,
    offsets: Sequence[int],
    lengths: Sequence[int],
) -> torch.Tensor:
    """A box of the stored chunk in a whole entry, sharing its memory."""
    tensor = tensor_of(entry, catalog, row)
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def tensor_of(entry: bytes | memoryview, catalog: Catalog, row: int) -> torch.Tensor:
    """The stored chunk in a whole entry, sharing its memory."""
    index = catalog.index
    key = int(index.key_of[row])
    dtype = index.properties[index.property_of[key]].dtype
    shape = tuple(size_of(index.shape[row], int(index.ndim[key])))
    try:
        found = tensor_in(entry)
    except CheckpointCorruptError as error:
        raise error.at(entry=index.fqns[key]) from error
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise CheckpointCorruptError(
            f"the entry holds {found.dtype} of shape {tuple(found.shape)}, "
            f"the metadata says {dtype} of shape {shape}",
            entry=index.fqns[key],
        )
    return found


def tensor_in(entry: bytes | memoryview) -> torch.Tensor:
    """The tensor in a whole entry. Raises CheckpointCorruptError for a damaged one."""
    return _tensor_at(entry, locate(lambda at, nbytes: entry[at : at + nbytes], len(entry)))


def _tensor_at(entry: bytes | memoryview, record: TensorRecord) -> torch.Tensor:
    if not math.prod(record.shape):
        return torch.empty(record.shape, dtype=record.dtype)
    data = bytearray(memoryview(entry)[record.data_offset :][: record.data_nbytes])
    if record.crc is not None and crc32(data) != record.crc:
        raise CheckpointCorruptError(
            f"expected CRC {record.crc:#010x} of the tensor's data, got {crc32(data):#010x}",
            offset=record.data_offset,
        )
    flat = torch.frombuffer(data, dtype=record.dtype)
    return flat.as_strided(record.shape, record.stride, record.storage_offset)


def _limit(catalog: Catalog, row: int, for_values: int) -> int:
    index = catalog.index
    key = int(index.key_of[row])
    if index.ndim[key] < 0:
        return for_values
    return int(index.shape[row].prod()) * int(index.itemsize[key]) + ROOM_BYTES


def read_at_most(stream: IO[bytes], limit: int) -> bytes:
    """The stream's content, up to a number of bytes."""
    # BytesIO hands out its own memory; a list of pieces would have to be copied to join it.
    whole = io.BytesIO()
    while whole.tell() < limit:
        part = stream.read(min(limit - whole.tell(), 1 << 20))
        if not part:
            break
        whole.write(part)
    return whole.getvalue()
