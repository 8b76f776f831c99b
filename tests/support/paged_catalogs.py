"""A catalog whose manifest has two hundred pages, and the file that says so, in memory."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties

from pytest_dcp._engine.format import metadata_file, page_table
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.metadata_trailer import (
    ALIGNMENT,
    TRAILER_BYTES,
    Trailer,
    read_trailer,
)
from pytest_dcp._engine.format.page_table import PageTable
from pytest_dcp._engine.format.paged_catalog import PagedManifest
from pytest_dcp._engine.plan.boxes import row_bounds
from pytest_dcp._engine.plan.index import Index

PAGE = page_table.LEAST_PAGE_BYTES
KEYS, CHUNKS, ROWS, COLUMNS = 60, 200, 4, 3


@contextmanager
def small_pages() -> Iterator[None]:
    """Every manifest written inside has a table, of the smallest pages."""
    with patch.multiple(page_table, TABLE_FROM_BYTES=0, PAGE_BYTES=PAGE):
        yield


def many_chunks() -> Catalog:
    """Tensors of two dimensions and of one, in 200 chunks each, a byte value and an empty tensor.

    Each chunk has two checksums, and all have other numbers.
    """
    kinds = np.array([2, 1] * (KEYS // 2) + [-1, 1], np.int16)
    counts = np.array([CHUNKS] * KEYS + [1, 0], dtype=np.int64)
    first, chunks = row_bounds(counts), int(counts.sum())
    key_of = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(chunks) - first[key_of]
    is_flat, is_value = kinds[key_of] == 1, kinds[key_of] < 0
    size = np.array([[CHUNKS * ROWS, COLUMNS], [CHUNKS * ROWS, 1]] * (KEYS // 2) + [[1, 1], [0, 1]])
    offset = np.stack([chunk * ROWS, np.zeros(chunks, np.int64)], axis=1)
    shape = np.stack([np.full(chunks, ROWS), np.where(is_flat, 1, COLUMNS)], axis=1)
    offset[is_value], shape[is_value] = 0, 1
    nbytes = np.where(is_value, 40, shape.prod(axis=1) * 4)
    start = np.arange(chunks) * 200
    blocks = -(-nbytes // 32)
    return Catalog(
        Index(
            fqns=(*(f"layers.{n}.weight" for n in range(KEYS)), "step", "nothing"),
            property_of=np.where(kinds < 0, -1, 0).astype(np.int32),
            properties=(TensorProperties(torch.float32),),
            ndim=kinds,
            size=size,
            first=first,
            offset=offset,
            shape=shape,
        ),
        EntryPlaces(
            files=("__0_0.distcp", "__1_0.distcp"),
            file=(np.arange(chunks) % 2).astype(np.int32),
            start=start,
            length=np.full(chunks, 180, np.int64),
            data_start=start + 64,
            data_nbytes=nbytes,
            first_sum=row_bounds(blocks),
            sums=np.arange(int(blocks.sum()), dtype=np.uint32) * 7919,
            block_bytes=32,
        ),
        planner_data={f"layers.{n}.weight": ("layers", n, "weight") for n in range(KEYS)},
        storage_meta=StorageMeta("/x", save_id="a" * 32),
        version="1",
    )


def save_many_chunks(folder: Path, fill: float = 0.0) -> dict[str, torch.Tensor]:
    """Write that catalog with its data, and a table of pages; returns the tensors.

    The value's bytes are no pickle.
    """
    catalog = many_chunks()
    index, places = catalog.index, catalog.places
    rows = CHUNKS * ROWS
    tensors = {
        fqn: torch.arange(rows * (width := COLUMNS if key % 2 == 0 else 1), dtype=torch.float32)
        .add(key + fill)
        .reshape((rows, width) if key % 2 == 0 else (rows,))
        for key, fqn in enumerate(index.fqns[:KEYS])
    }
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values()) + bytes(40)
    contents = [bytearray(200 * len(places.file)) for _ in places.files]
    sums, at = [], 0
    for file, start, nbytes in zip(
        places.file.tolist(), places.data_start.tolist(), places.data_nbytes.tolist(), strict=True
    ):
        part = data[at : at + nbytes]
        contents[file][start : start + nbytes] = part
        ends = [*range(32, nbytes, 32), nbytes]
        sums += [zlib.crc32(part[:end]) for end in ends]
        at += nbytes
    folder.mkdir(exist_ok=True)
    for name, content in zip(places.files, contents, strict=True):
        (folder / name).write_bytes(content)
    meta = StorageMeta(str(folder), save_id=uuid.uuid4().hex)
    places = replace(places, sums=np.array(sums, np.uint32))
    (folder / "new").write_bytes(encode_paged(replace(catalog, places=places, storage_meta=meta)))
    (folder / "new").rename(folder / ".metadata")
    return tensors


def encode_paged(catalog: Catalog) -> bytes:
    """The file of a catalog, with a table of small pages."""
    with small_pages():
        return b"".join(metadata_file.encode(catalog))


def add_table(data: bytes, manifest: bytes | None = None) -> bytes:
    """A file of this engine with a table of small pages, and with another manifest if one is given.

    All checksums are right, and nothing is checked.
    """
    trailer = read_trailer(memoryview(data)[-TRAILER_BYTES:], 0)
    stock = data[: trailer.pickle_length]
    start = trailer.manifest_start
    manifest = manifest or data[start : start + trailer.manifest_length]
    stock += PageTable.of(manifest, PAGE).pack()
    gap = bytes(-len(stock) % ALIGNMENT)
    trailer = Trailer(
        manifest_crc=zlib.crc32(manifest),
        manifest_start=len(stock) + len(gap),
        manifest_length=len(manifest),
        pickle_length=len(stock),
        pickle_crc=zlib.crc32(stock),
    )
    return stock + gap + manifest + trailer.pack()


class FileInMemory:
    """A file that is read by ranges; counts the bytes."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.bytes_read = 0

    def read(self, offset: int, view: memoryview) -> int:
        part = self.data[offset : offset + len(view)]
        view[: len(part)] = part
        self.bytes_read += len(part)
        return len(part)

    def open(self) -> PagedManifest | None:
        """Its manifest, opened by pages."""
        with small_pages():
            return metadata_file.open_pages(self.read, len(self.data), len(self.data))
