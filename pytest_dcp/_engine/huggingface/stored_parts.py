"""The parts of tensors that safetensors files hold, and the catalog of them. Pure (no I/O).

No part of a tensor may be in two files: readers would take either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import TensorProperties

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.catalog_checks import check_catalog
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.safetensors_header import (
    FQN_KEY,
    OFFSETS_KEY,
    SHARDING_KEY,
    SIZE_KEY,
    Header,
    StoredTensor,
    counts,
    parse_json,
)
from pytest_dcp._engine.plan.boxes import overlapping_pairs, pad_rows
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError


@dataclass(frozen=True, slots=True)
class Part:
    """One stored box of a tensor."""

    fqn: str
    offset: tuple[int, ...]
    """In the full tensor."""
    size: tuple[int, ...] | None
    """Of the full tensor, if the file says it."""
    tensor: StoredTensor
    file: str
    start: int
    """Bytes from the file's start to the data."""


def parts_of(name: str, header: Header, limit: MemoryLimit = DEFAULT_LIMIT) -> list[Part]:
    """The boxes that a file holds; each is a whole tensor unless the file says otherwise."""
    text = header.metadata.get(SHARDING_KEY)
    try:
        shards = {} if text is None else parse_json(text, SHARDING_KEY, limit)
        return [
            _part(name, header, tensor, shards.get(tensor.name) if text else {OFFSETS_KEY: None})
            for tensor in header.tensors
        ]
    except CheckpointCorruptError as error:
        raise error.at(file=name) from error


def _part(file: str, header: Header, tensor: StoredTensor, shard: Any) -> Part:
    ndim = len(tensor.shape)
    if not isinstance(shard, dict) or OFFSETS_KEY not in shard:
        raise CheckpointCorruptError(f"expected its offset in {SHARDING_KEY}", entry=tensor.name)
    offset, size, fqn = shard[OFFSETS_KEY], shard.get(SIZE_KEY), shard.get(FQN_KEY, tensor.name)
    offset = [0] * ndim if offset is None else offset
    for numbers in (offset, *([] if size is None else [size])):
        if not counts(numbers) or len(numbers) != ndim or max(numbers, default=0) > 1 << 62:
            raise CheckpointCorruptError(
                f"expected {ndim} numbers, got {numbers!r:.200}", entry=tensor.name
            )
    if type(fqn) is not str:
        raise CheckpointCorruptError("expected a tensor's name", entry=tensor.name)
    return Part(
        fqn=fqn,
        offset=tuple(offset),
        size=None if size is None else tuple(size),
        tensor=tensor,
        file=file,
        start=header.data_start + tensor.start,
    )


def select_mapped_parts(parts: Sequence[Part], weight_map: Mapping[str, str]) -> list[Part]:
    """The parts, except parts that the index has in another file."""
    mapped_parts = [part for part in parts if weight_map.get(part.fqn, part.file) == part.file]
    lost = weight_map.keys() - {part.fqn for part in mapped_parts}
    if lost:
        fqn = min(lost)
        raise CheckpointCorruptError(
            "the index says that this file has the tensor, and it has not",
            file=weight_map[fqn],
            entry=fqn,
        )
    return mapped_parts


def catalog_of(parts: Sequence[Part]) -> Catalog:
    """The catalog of parts that are one checkpoint.

    Raises CheckpointCorruptError if parts of a tensor overlap or do not fit together.
    """
    grouped: dict[str, list[Part]] = {}
    for part in parts:
        grouped.setdefault(part.fqn, []).append(part)
    rows = [part for group in grouped.values() for part in group]
    sizes = [_full_size(fqn, group) for fqn, group in grouped.items()]
    rank = max(map(len, sizes), default=0)
    dtypes = list(dict.fromkeys(part.tensor.dtype for part in rows))
    first = np.cumsum([0, *map(len, grouped.values())], dtype=np.int64)
    index = Index(
        fqns=tuple(grouped),
        property_of=np.array([dtypes.index(g[0].tensor.dtype) for g in grouped.values()], np.int32),
        properties=tuple(TensorProperties(dtype) for dtype in dtypes),
        ndim=np.array([len(size) for size in sizes], dtype=np.int16),
        size=pad_rows(sizes, rank, 1),
        first=first,
        offset=pad_rows([part.offset for part in rows], rank, 0),
        shape=pad_rows([part.tensor.shape for part in rows], rank, 1),
    )
    catalog = Catalog(index, _places(rows))
    check_catalog(catalog)
    _check_apart(index, rows)
    return catalog


def _places(rows: Sequence[Part]) -> EntryPlaces:
    files: dict[str, int] = {}
    file = [files.setdefault(part.file, len(files)) for part in rows]
    start = np.array([part.start for part in rows], dtype=np.int64)
    nbytes = np.array([part.tensor.nbytes for part in rows], dtype=np.int64)
    return EntryPlaces(
        files=tuple(files),
        file=np.array(file, dtype=np.int32),
        start=start,
        length=nbytes,
        data_start=start,
        data_nbytes=nbytes,
        first_sum=np.zeros(len(rows) + 1, dtype=np.int64),
        sums=np.zeros(0, dtype=np.uint32),
    )


def _full_size(fqn: str, group: Sequence[Part]) -> tuple[int, ...]:
    """The size that every part states, or else the extent of the parts."""
    lead = group[0]
    for part in group:
        alike = (part.tensor.dtype, len(part.offset), part.size) == (
            lead.tensor.dtype, len(lead.offset), lead.size
        )  # fmt: skip
        if not alike:
            raise CheckpointCorruptError(
                f"this file has a part of {part.tensor.dtype} of {part.size or part.tensor.shape}, "
                f"{lead.file!r} one of {lead.tensor.dtype} of {lead.size or lead.tensor.shape}: "
                "are they of different saves?",
                file=part.file,
                entry=fqn,
            )
    if lead.size is not None:
        return lead.size
    ends = zip(*(tuple(map(sum, zip(p.offset, p.tensor.shape, strict=True))) for p in group),
               strict=True)  # fmt: skip
    return tuple(max(side) for side in ends)


def _check_apart(index: Index, rows: Sequence[Part]) -> None:
    for key in np.flatnonzero(np.diff(index.first) > 1).tolist():
        chunks = slice(int(index.first[key]), int(index.first[key + 1]))
        for one, other in overlapping_pairs(index.offset[chunks], index.shape[chunks], limit=1):
            files = [rows[chunks.start + row].file for row in (one, other)]
            raise CheckpointCorruptError(
                f"this file and {files[0]!r} hold the same part of the tensor: they are of "
                "different saves; remove the one that does not belong",
                file=files[1],
                entry=index.fqns[key],
            )
        if index.ndim[key] == 0:
            raise CheckpointCorruptError(
                f"{chunks.stop - chunks.start} files hold the same scalar: they are of different "
                "saves; remove the ones that do not belong",
                file=rows[chunks.stop - 1].file,
                entry=index.fqns[key],
            )
