"""Carries out a load plan through a storage's streams, entry by entry.

For storages with their own hooks between a file and its entries, and for storages that know only
where the entries are. Each entry is read whole; the entry itself describes the tensor.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from pytest_dcp._engine.format.memory_limit import MemoryLimit
from pytest_dcp._engine.format.shared_names import missing_data_file
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.transformed_entries import ROOM_BYTES, read_at_most, tensor_in
from pytest_dcp.errors import CheckpointCorruptError


@dataclass(frozen=True, slots=True)
class Streams:
    """How a storage gives its entries."""

    open_file: Callable[[str], AbstractContextManager[Any]]
    """A data file, by its name."""
    slice_file: Callable[[Any, Any], IO[bytes]]
    """The entry within a file, by its place."""
    transform: Callable[[ReadItem, Sequence[str], IO[bytes]], IO[bytes]]
    """The entry with the transforms of these descriptors undone."""


def read_streams(
    streams: Streams,
    items: Sequence[ReadItem],
    places: Mapping[Any, Any],
    planner: LoadPlanner,
    observer: Observer,
    memory: MemoryLimit,
) -> int:
    """Fill the planner's targets; returns the bytes read. Each file is opened once.

    memory: the limit for a transformed entry.

    Raises CheckpointCorruptError for an item that has no place, and for a damaged entry.
    """
    total = 0
    for name, some in items_by_file(items, places).items():
        try:
            with streams.open_file(name) as file:
                for item in some:
                    entry = _entry(streams, file, item, places[item.storage_index], memory)
                    total += len(entry)
                    observer.advance(len(entry))
                    _deliver(item, entry, planner)
        except FileNotFoundError as error:
            raise missing_data_file(name) from error
    return total


def items_by_file(
    items: Sequence[ReadItem], places: Mapping[Any, Any]
) -> dict[str, list[ReadItem]]:
    """The items of each file. Raises CheckpointCorruptError for an item that has no place."""
    by_file: dict[str, list[ReadItem]] = {}
    for item in items:
        by_file.setdefault(str(_place_of(item, places).relative_path), []).append(item)
    return by_file


def _place_of(item: ReadItem, places: Mapping[Any, Any]) -> Any:
    if item.storage_index not in places:
        raise CheckpointCorruptError(
            f"the plan reads {item.storage_index}, of which the storage does not know the place",
            entry=item.storage_index.fqn,
        )
    return places[item.storage_index]


def _entry(streams: Streams, file: Any, item: ReadItem, place: Any, memory: MemoryLimit) -> bytes:
    descriptors = getattr(place, "transform_descriptors", None) or ()
    stream = streams.transform(item, descriptors, streams.slice_file(file, place))
    limit = memory.of(int(place.length)) if descriptors else int(place.length) + ROOM_BYTES
    entry = read_at_most(stream, limit + 1)
    if len(entry) > limit:
        raise CheckpointCorruptError(
            f"the entry grows past {limit} bytes when it is decoded", entry=item.storage_index.fqn
        )
    return entry


def _deliver(item: ReadItem, entry: bytes, planner: LoadPlanner) -> None:
    if item.type == LoadItemType.BYTE_IO:
        planner.load_bytes(item, io.BytesIO(entry))
        return
    try:
        stored = tensor_in(entry)
    except CheckpointCorruptError as error:
        raise error.at(entry=item.storage_index.fqn) from error
    target = planner.resolve_tensor(item).detach()
    target.copy_(_part(item, stored, target))
    planner.commit_tensor(item, target)


def _part(item: ReadItem, stored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The part of a stored tensor that the item wants and the target has room for."""
    ends = [a + n for a, n in zip(item.storage_offsets, item.lengths, strict=True)]
    inside = [end <= side for end, side in zip(ends, stored.shape, strict=False)]
    fits = len(ends) == stored.dim() and all(inside) and min(item.storage_offsets, default=0) >= 0
    if not fits or target.size() != torch.Size(item.lengths):
        raise ValueError(
            f"req {item.storage_index} mismatch sizes: it wants {tuple(item.lengths)} from "
            f"{tuple(item.storage_offsets)} on of a tensor of {tuple(stored.shape)}, for a target "
            f"of {tuple(target.size())}"
        )
    part = stored
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        part = part.narrow(dim, start, length)
    return part
