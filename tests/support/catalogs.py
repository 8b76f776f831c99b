"""Strategies for catalogs, each with the torch objects that it stands for, built by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import PosixPath
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.plan.index import Index

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
FILES = ["__0_0.distcp", "__1_0.distcp", "run-7/__0_0.distcp", "…\n'\"name .distcp"]
AWKWARD = ["", ".", "a.b.c", 'quo"te', '"led', "two\nlines", "ключ.é", "nul\0", "size", "offset"]

fqns = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8), st.from_regex(r"\w+(\.\w+){0,3}"))
properties = st.builds(
    TensorProperties,
    dtype=st.sampled_from(DTYPES),
    layout=st.just(torch.strided),
    requires_grad=st.booleans(),
    memory_format=st.sampled_from(
        [torch.contiguous_format, torch.channels_last, torch.preserve_format]
    ),
    pin_memory=st.booleans(),
)
paths = st.lists(st.one_of(fqns, st.integers(0, 99)), max_size=3).map(tuple)
storage_metas = st.one_of(
    st.none(),
    st.builds(
        StorageMeta,
        checkpoint_id=st.sampled_from([None, "/some/where", PosixPath("/some/where")]),
        save_id=st.one_of(st.none(), st.text(max_size=5)),
        modules=st.lists(st.text(max_size=3), max_size=2),
    ),
)


@dataclass(frozen=True)
class Sample:
    """A catalog and the torch object that it says."""

    catalog: Catalog
    stock: Metadata


@dataclass
class _Row:
    """A chunk's place, as it goes into the columns."""

    file: str | None = None
    start: int = -1
    length: int = -1
    data_start: int = -1
    data_nbytes: int = -1
    sums: int = 0
    transforms: tuple[str, ...] = ()


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Keys with several chunks each, some without place, some whose data is known."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    rows: list[_Row] = []
    block_bytes = draw(st.sampled_from([1 << 16, 8, 5]))
    for fqn in draw(st.lists(fqns, unique=True, max_size=5)):
        chunks: list[Any] = [None]
        if draw(st.integers(0, 3)):
            entries[fqn] = draw(tensors())
            chunks = entries[fqn].chunks
        else:
            entries[fqn] = BytesStorageMetadata()
        for at, chunk in enumerate(chunks):
            row = draw(places(entries[fqn], chunk, block_bytes))
            rows.append(row)
            key = MetadataIndex(fqn) if chunk is None else MetadataIndex(fqn, chunk.offsets, at)
            if row.file is not None:
                listed = list(row.transforms) or None
                storage[key] = _StorageInfo(row.file, row.start, row.length, listed)
    stock = Metadata(
        entries,
        draw(planner_data(list(entries))),
        storage,
        draw(storage_metas),
        draw(st.sampled_from([None, "1.0.0"])),
    )
    catalog = Catalog(
        Index.of(entries),
        _places(rows, block_bytes),
        stock.planner_data,
        stock.storage_meta,
        stock.version,
    )
    return Sample(catalog, stock)


@st.composite
def tensors(draw: st.DrawFn) -> TensorStorageMetadata:
    side = st.one_of(st.integers(0, 6), st.sampled_from([1 << 33]))
    size = draw(st.lists(side, max_size=4 if draw(st.booleans()) else 1))
    if math.prod(max(n, 1) for n in size) > 1 << 58:
        size = [min(n, 6) for n in size]
    corner = st.tuples(*(st.integers(0, n) for n in size))
    chunks = []
    for offset in draw(st.lists(corner, unique=True, max_size=3)):
        shape = [draw(st.integers(0, n - o)) for n, o in zip(size, offset, strict=True)]
        chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
    return TensorStorageMetadata(draw(properties), torch.Size(size), chunks)


@st.composite
def places(draw: st.DrawFn, entry: Any, chunk: Any, block_bytes: int) -> _Row:
    file = draw(st.one_of(st.sampled_from(FILES), st.none()))
    if file is None:
        return _Row()
    start = draw(st.sampled_from([0, 17, (1 << 31) - 1, 1 << 31, 1 << 40]))
    some = ("zstd", "é"), ("size",), ("zstd", "aes-256")
    transforms = draw(st.one_of(st.just(()), st.sampled_from(some)))
    if draw(st.booleans()):
        return _Row(file, start, draw(st.integers(0, 99)), transforms=transforms)
    nbytes = draw(st.integers(0, 40))
    if chunk is not None:
        nbytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
    lead, tail = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    blocks = -(-nbytes // block_bytes)
    sums = blocks if blocks < 99 and draw(st.booleans()) else 0
    return _Row(file, start, lead + nbytes + tail, start + lead, nbytes, sums, transforms)


@st.composite
def planner_data(draw: st.DrawFn, keys: list[str]) -> Any:
    """The default planner's data for these keys, or arbitrary data of a user's planner."""
    choice = draw(st.integers(0, 5))
    if choice == 0:
        return draw(st.sampled_from([None, {}, {"step": [1, {"lr": 0.1}]}, "words", {1: ("a",)}]))
    found: dict[str, tuple[Any, ...]] = {}
    for fqn in keys:
        how = draw(st.integers(0, 4))
        words = fqn.split(".")
        if how == 1:
            found[fqn] = (fqn,)
        elif how == 2:
            found[fqn] = tuple(words)
        elif how == 3:
            found[fqn] = tuple(int(w) if w.isascii() and w.isdigit() else w for w in words)
        elif how == 4:
            found[fqn] = draw(paths)
    return found | draw(st.dictionaries(fqns, paths, max_size=1))


def _places(rows: list[_Row], block_bytes: int) -> EntryPlaces:
    files = sorted({row.file for row in rows if row.file is not None})

    def column(name: str, dtype: type) -> Any:
        return np.array([getattr(row, name) for row in rows], dtype=dtype)

    first_sum = np.concatenate([[0], column("sums", np.int64).cumsum()]).astype(np.int64)
    return EntryPlaces(
        files=tuple(files),
        file=np.array([-1 if r.file is None else files.index(r.file) for r in rows], np.int32),
        start=column("start", np.int64),
        length=column("length", np.int64),
        data_start=column("data_start", np.int64),
        data_nbytes=column("data_nbytes", np.int64),
        first_sum=first_sum,
        sums=np.arange(first_sum[-1], dtype=np.uint32) * 77,
        block_bytes=block_bytes,
        transforms={i: row.transforms for i, row in enumerate(rows) if row.transforms},
    )


def describe_fields(value: Any) -> Any:
    """Everything that an object of torch's metadata holds: types, fields, items in their order."""
    if is_dataclass(value):
        return type(value), {name: describe_fields(part) for name, part in value.__dict__.items()}
    if isinstance(value, dict):
        return type(value), [
            (describe_fields(key), describe_fields(part)) for key, part in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return type(value), [describe_fields(part) for part in value]
    return type(value), value


def same(a: Catalog, b: Catalog) -> bool:
    """Whether two catalogs hold the same, column by column."""
    are_equal = (a.planner_data, a.storage_meta, a.version) == (
        b.planner_data,
        b.storage_meta,
        b.version,
    )
    return are_equal and all(
        _equal(getattr(one, field.name), getattr(other, field.name))
        for one, other in ((a.index, b.index), (a.places, b.places))
        for field in fields(one)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)
