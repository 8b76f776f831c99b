"""The items of one rank's plan, with the places of their bytes: reads them into given memory.

    resolve  resolve_items          items -> rows of the catalog -> files and offsets
    plan     copy_plan.copies       rows x targets -> copies
    execute  read_copies, read_values   copies -> bytes in the targets; entries -> bytes

Nothing here knows a planner. The targets come as a table (`Targets`); bytes of values and bytes
counted leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.distributed.checkpoint.planner import ReadItem

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.checked_ranges import ByteCounts
from pytest_dcp._engine.io.copy_plan import Targets, copies
from pytest_dcp._engine.io.entry_places import (
    LocatedEntries,
    ResolvedCatalog,
    apply_located,
    resolve_entry_places,
)
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.plan_entries import match_entries
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import CopyRequest, ReadSettings, read_copies, read_values
from pytest_dcp._engine.io.transformed_entries import plain_entry, tensor_part
from pytest_dcp._engine.plan.boxes import Ints, volumes
from pytest_dcp._engine.plan.columns import READ_BYTES, ReadItems
from pytest_dcp._torch_internals.checkpoint_classes import ExtensionRegistry
from pytest_dcp.garbage_collection import collector_paused


@dataclass(frozen=True, slots=True)
class ItemSource:
    """Where items are read from, and how."""

    folder: Folder
    catalog: Catalog
    settings: ReadSettings
    registry: ExtensionRegistry
    """Undoes the stream transforms of entries."""
    observer: Observer
    located: Sequence[LocatedEntries] = ()
    """Places that other ranks have found in entries that must be parsed."""


@dataclass(frozen=True, slots=True)
class StoredItems:
    """The items of a plan and the places of their bytes; made by `resolve_items`."""

    source: ItemSource
    found: ResolvedCatalog
    items: ReadItems
    nbytes: Ints
    """Of each row."""
    tally: ByteCounts = field(default_factory=ByteCounts)
    """Bytes read so far."""
    received: dict[int, bytes | memoryview] = field(default_factory=dict)
    """Entries that need not be read, as stored: another rank may have read them."""

    @property
    def catalog(self) -> Catalog:
        """The catalog in which every item has its place."""
        return self.found.catalog

    def read_into(self, targets: Targets, *, narrowed: bool = False) -> None:
        """Fill the targets of these rows from the files.

        narrowed: whether each tensor is only the part of the wanted box that its row fills.
        """
        self.tally.add(read_copies(self.request_of(targets, narrowed=narrowed)))

    def request_of(self, targets: Targets, *, narrowed: bool = False) -> CopyRequest:
        """The copies that fill these targets; `narrowed` as for `read_into`."""
        source, items = self.source, self.items
        if narrowed:
            # For planning and reading alike: both place the copy within the target.
            items = replace(items, to_offset=np.zeros_like(items.to_offset))
        with collector_paused():
            plan = copies(items, targets, self.catalog.index, self.found.odd_strides)
        folder, settings, observer = source.folder, source.settings, source.observer
        return CopyRequest(folder, self.catalog, items, plan, settings, observer)

    def decode_tensor(self, row: int) -> torch.Tensor:
        """The part that a row wants of a tensor whose entry passed through stream transforms."""
        ((_, entry),) = self.read_entries(np.array([row]))
        item = self.items[row]
        box = item.storage_offsets, item.lengths
        return tensor_part(entry, self.catalog, int(self.items.entry[row]), *box)

    def read_entries(self, rows: Ints) -> Iterator[tuple[int, bytes | memoryview]]:
        """Each of these rows with its entry, any stream transforms undone."""
        source, entries = self.source, self.items.entry[rows].tolist()
        unread = [entry for entry in entries if entry not in self.received]
        found, tally = read_values(
            source.folder, self.catalog, unread, source.settings, source.observer
        )
        self.tally.add(tally)
        found.update((entry, self.received[entry]) for entry in entries if entry in self.received)
        # One limit for all values: each may be small, and there may be thousands of them.
        remaining_memory = source.settings.memory.of(sum(map(len, found.values())))
        for row, entry in zip(rows.tolist(), entries, strict=True):
            plain = plain_entry(
                found[entry], self.catalog, entry, source.registry, remaining_memory
            )
            if entry in self.catalog.places.transforms:
                remaining_memory -= len(plain)
            yield row, plain
            del plain


def resolve_items(source: ItemSource, items: ReadItems) -> StoredItems:
    """The items with the places of their bytes.

    Raises CheckpointCorruptError for an item that the catalog lacks, and for a damaged entry.
    """
    catalog = source.catalog
    items = match_entries(items, catalog.index)
    values = frozenset(items.entry[items.kind == READ_BYTES].tolist())
    if source.located:
        before = apply_located(catalog, source.located)
        found = resolve_entry_places(source.folder, before.catalog, items.entry, values)
        found.odd_strides |= before.odd_strides
    else:
        found = resolve_entry_places(source.folder, catalog, items.entry, values)
    return StoredItems(source, found, items, _sizes(items, found.catalog))


def _sizes(items: ReadItems, catalog: Catalog) -> Ints:
    """Bytes of each row."""
    tensors = volumes(items.shape) * catalog.index.itemsize[catalog.index.key_of[items.entry]]
    return np.where(items.kind == READ_BYTES, catalog.places.length[items.entry], tensors)


def check_size(item: ReadItem, target: torch.Tensor) -> None:
    """Raise ValueError, in torch's words, unless the target has the item's size."""
    if target.size() != item.lengths:
        raise ValueError(
            f"req {item.storage_index} mismatch sizes {target.size()} vs {item.lengths}"
        )
