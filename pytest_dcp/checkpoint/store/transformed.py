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
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

ROOM_BYTES = 1 << 20
"""What an entry may take beside a tensor's data."""
VALUE_BYTES = 1 << 30
"""The most that a value may grow to: a small file must not fill the memory."""


def plain_entry(stored: bytes, catalog: Catalog, row: int, registry: ExtensionRegistry) -> bytes:
    """The entry as it was before its transforms; as it is where it had none.

    Raises CheckpointCorruptError where it grows past what its tensor can take.
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
    limit = _limit(catalog, row)
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
            f"the entry grows past {limit} bytes when it is decoded",
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


def _limit(catalog: Catalog, row: int) -> int:
    index = catalog.index
    key = int(index.key_of[row])
    if index.ndim[key] < 0:
        return VALUE_BYTES
    return int(index.shape[row].prod()) * int(index.itemsize[key]) + ROOM_BYTES


def _read_at_most(stream: IO[bytes], limit: int) -> bytes:
    parts: list[bytes] = []
    left = limit
    while left:
        part = stream.read(min(left, 1 << 20))
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
