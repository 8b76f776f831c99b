"""Entries that passed through stream transforms (compression), decoded whole and in bounds."""

from __future__ import annotations

import io
from typing import IO

import torch
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

from pytest_dcp.checkpoint.plan.columns import size_of
from pytest_dcp.checkpoint.store.catalog import Catalog
from pytest_dcp.checkpoint.store.entry import tensor_frame
from pytest_dcp.checkpoint.store.locate import locate
from pytest_dcp.checkpoint.store.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

ROOM_BYTES = 1 << 20
"""What an entry may take beside a tensor's data."""


def plain_entry(
    stored: bytes,
    catalog: Catalog,
    row: int,
    registry: ExtensionRegistry,
    memory: MemoryLimit = DEFAULT_LIMIT,
) -> bytes:
    """The entry as it was before its transforms; as it is where it had none.

    Raises CheckpointCorruptError where it grows past what its tensor can take, or a value past the
    limit of memory.
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
    limit = _limit(catalog, row, memory.of(len(stored)))
    try:
        for extension in extensions:
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        entry = _read_at_most(stream, limit + 1)
    except Exception as error:
        # A codec may raise what it likes.
        raise CheckpointCorruptError(
            f"the entry cannot be decoded by {list(descriptors)}: {error}", entry=fqn
        ) from error
    if len(entry) > limit:
        raise CheckpointCorruptError(
            f"the entry, of {len(stored)} bytes, grows past {limit} when it is decoded: a tensor "
            "is never so large, and for a value that you trust raise max_decoded_bytes of the "
            "storage reader",
            entry=fqn,
        )
    return entry


def tensor_of(entry: bytes, catalog: Catalog, row: int) -> torch.Tensor:
    """The stored chunk in a whole entry, sharing its memory."""
    index = catalog.index
    key = int(index.key_of[row])
    dtype = index.properties[index.property_of[key]].dtype
    shape = tuple(size_of(index.shape[row], int(index.ndim[key])))
    frame = tensor_frame(dtype, shape)
    try:
        record = locate(lambda at, nbytes: entry[at : at + nbytes], len(entry))
    except CheckpointCorruptError as error:
        raise error.at(entry=index.fqns[key]) from error
    if record.dtype != dtype or record.shape != shape:
        raise CheckpointCorruptError(
            f"the entry holds {record.dtype} of shape {record.shape}, "
            f"the metadata says {dtype} of shape {shape}",
            entry=index.fqns[key],
        )
    if not frame.data_nbytes:
        return torch.empty(shape, dtype=dtype)
    data = bytearray(memoryview(entry)[record.data_offset :][: record.data_nbytes])
    flat = torch.frombuffer(data, dtype=dtype)
    return flat.as_strided(shape, record.stride, record.storage_offset)


def _limit(catalog: Catalog, row: int, for_values: int) -> int:
    index = catalog.index
    key = int(index.key_of[row])
    if index.ndim[key] < 0:
        return for_values
    return int(index.shape[row].prod()) * int(index.itemsize[key]) + ROOM_BYTES


def _read_at_most(stream: IO[bytes], limit: int) -> bytes:
    # BytesIO gives away its own memory: pieces and a joined copy would be two of them.
    whole = io.BytesIO()
    while whole.tell() < limit:
        part = stream.read(min(limit - whole.tell(), 1 << 20))
        if not part:
            break
        whole.write(part)
    return whole.getvalue()
