"""A load plan's items -> rows of the catalog, and the files that they are in. Pure (no I/O).

Items planned by this engine carry their rows. A user's planner may have changed items, or made them
from other metadata: these are looked up by name and offset.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.entry_places import ResolvedCatalog
from pytest_dcp._engine.plan.boxes import Ints, widen_table
from pytest_dcp._engine.plan.columns import READ_BYTES, ReadItems
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError


@dataclass(frozen=True, slots=True)
class RowKinds:
    """Rows of the read items, grouped by how they reach their targets; each row is in one group."""

    values: Ints
    """Python values: their entries are decoded."""
    wrapped: Ints
    """Wrappers of other tensors, in torch's own pickle: their inner tensors are copied."""
    numbers: Ints
    """Numbers for the planner that are stored as tensors: read into memory of its own."""
    transformed: Ints
    """Tensors whose entries were written through stream transforms: decoded whole, then copied."""
    tensors: Ints
    """All other tensors: copied from the file."""


def sort_rows(items: ReadItems, found: ResolvedCatalog, numbers: NDArray[np.bool_]) -> RowKinds:
    """The rows by kind. numbers: which rows are numbers for the planner, if they are tensors."""
    values = items.kind == READ_BYTES
    marked = np.zeros(len(found.catalog.index.offset), dtype=bool)
    marked[list(found.catalog.places.transforms)] = True
    transformed = marked[items.entry] & ~values
    marked[:] = False
    marked[list(found.wrapped)] = True
    wrapped = marked[items.entry] & ~values & ~transformed
    numbers = numbers & ~values & ~wrapped
    return RowKinds(
        values=np.flatnonzero(values),
        wrapped=np.flatnonzero(wrapped),
        numbers=np.flatnonzero(numbers),
        transformed=np.flatnonzero(transformed & ~numbers),
        tensors=np.flatnonzero(~values & ~transformed & ~wrapped & ~numbers),
    )


def files_of(catalog: Catalog, items: ReadItems) -> list[str]:
    """The names of the files that hold the items; items that the index lacks are left out."""
    try:
        entry = match_entries(items, catalog.index).entry
    except CheckpointCorruptError:
        return []
    numbers = np.unique(catalog.places.file[entry])
    return [catalog.places.files[number] for number in numbers[numbers >= 0].tolist()]


def match_entries(items: ReadItems, index: Index) -> ReadItems:
    """The items with the rows of their stored chunks, looked up if they refer to another index.

    Raises CheckpointCorruptError for an item that the index does not have.
    """
    if items.source is index:
        return items
    entry = items.entry.copy()
    for row in np.flatnonzero(~_named_rightly(items, index)).tolist():
        fqn = items.stored_fqns[row]
        if fqn not in index.row_of:
            raise CheckpointCorruptError("the plan reads a key that the metadata lacks", entry=fqn)
        key = index.row_of[fqn]
        first, last = int(index.first[key]), int(index.first[key + 1])
        width = min(items.stored.shape[1], index.offset.shape[1])
        same = (index.offset[first:last, :width] == items.stored[row, :width]).all(axis=1)
        if not same.any():
            raise CheckpointCorruptError(
                f"the plan reads a chunk at offset {items.stored[row].tolist()}, "
                "which the metadata lacks",
                entry=fqn,
            )
        entry[row] = first + int(np.argmax(same))
    return replace(items, entry=entry)


def _named_rightly(items: ReadItems, index: Index) -> NDArray[np.bool_]:
    """Whether each item's row is also that of its chunk in this index."""
    in_index = (items.entry >= 0) & (items.entry < len(index.offset))
    entry = np.where(in_index, items.entry, 0)
    if not in_index.any():
        return in_index
    key = index.key_of[entry]
    stored = zip(key.tolist(), items.stored_fqns, strict=True)
    same_fqn = np.fromiter((index.fqns[k] == fqn for k, fqn in stored), np.bool_, len(key))
    width = max(items.stored.shape[1], index.offset.shape[1])
    offset = widen_table(index.offset[entry], width, 0) == widen_table(items.stored, width, 0)
    alike: NDArray[np.bool_] = (
        in_index & same_fqn & (index.ndim[key] == items.ndim) & offset.all(axis=1)
    )
    return alike
