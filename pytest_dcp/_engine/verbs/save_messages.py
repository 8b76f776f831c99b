"""Messages between ranks in a save, compressed: row numbers instead of rows that both sides have.

A rank sends its local plan in full. It gets back its global plan as numbers of its own rows, with
their hints. After writing it sends only the places; the coordinator knows the items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.format import manifest_columns
from pytest_dcp._engine.format.catalog import Catalog, EntryTable
from pytest_dcp._engine.format.write_results import WriteColumns, WriteResults
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.verbs import wire_classes  # noqa: F401 - registers the classes to send


@dataclass(frozen=True, slots=True, eq=False)
class CompressedPlan:
    """A global plan for the rank whose local plan it was made from."""

    plan: SavePlan
    """Without items and data that the local plan already contains."""
    rows: Ints
    hint: Ints
    same_data: bool
    """Whether it has the local plan's planner_data."""


def compress_plan(plan: SavePlan, local: SavePlan) -> CompressedPlan | SavePlan:
    """Replace items that the receiver already has by their row numbers."""
    items: Any = plan.items
    own: Any = local.items
    if not isinstance(items, WriteItems) or items.origin is None:
        return plan
    if items.origin.table is not own:
        return plan
    same = plan.planner_data is local.planner_data
    bare = replace(plan, items=[], planner_data=None if same else plan.planner_data)
    return CompressedPlan(bare, items.origin.rows, items.hint, same)


def expand_plan(compressed: CompressedPlan | SavePlan, local: SavePlan) -> SavePlan:
    """Undo `compress_plan`."""
    if isinstance(compressed, SavePlan):
        return compressed
    items: Any = WriteItems.of(local.items).take(compressed.rows, compressed.hint)
    data = local.planner_data if compressed.same_data else compressed.plan.planner_data
    return replace(compressed.plan, items=items, planner_data=data)


def compress_results(
    results: Sequence[WriteResult], plan: SavePlan
) -> WriteColumns | Sequence[WriteResult]:
    """A rank's write results: only the places, if they have the items of its plan."""
    whole = isinstance(results, WriteResults) and results.is_untouched()
    if isinstance(results, WriteResults) and whole and results.items is plan.items:
        return results.written
    return results


def expand_results(
    compressed: WriteColumns | Sequence[WriteResult], plan: SavePlan | None
) -> Sequence[WriteResult]:
    """Undo `compress_results`."""
    if not isinstance(compressed, WriteColumns):
        return compressed
    if plan is None:
        raise ValueError("the coordinator has no plan for a rank that says where its items are")
    return WriteResults(plan.items, compressed)


@dataclass(frozen=True, slots=True)
class EncodedMetadata:
    """Metadata as columns."""

    manifest: bytes
    """A catalog's bytes, without the data of planner and storage."""
    python_values: tuple[Any, Any, Any, Mapping[str, Any]]
    """planner_data, storage_meta, version, further attributes."""


record(CompressedPlan, EncodedMetadata)


def encode_metadata(metadata: Metadata) -> EncodedMetadata | Metadata:
    """The metadata's columns, if it has any; else the metadata itself."""
    if not isinstance(metadata.storage_data, EntryTable):
        return metadata
    catalog = Catalog.of(metadata)
    bare = replace(catalog, planner_data=None, storage_meta=None, version=None, further={})
    python_values = (catalog.planner_data, catalog.storage_meta, catalog.version, catalog.further)
    return EncodedMetadata(manifest_columns.encode(bare), python_values)


def decode_metadata(encoded: EncodedMetadata | Metadata) -> Metadata:
    """Undo `encode_metadata`."""
    if isinstance(encoded, Metadata):
        return encoded
    bare = manifest_columns.decode(memoryview(encoded.manifest), _no_pickle)
    planner_data, storage_meta, version, further = encoded.python_values
    catalog = replace(
        bare,
        planner_data=planner_data,
        storage_meta=storage_meta,
        version=version,
        further=further,
    )
    return catalog.metadata()


def _no_pickle() -> Metadata:
    raise ValueError("a manifest that was sent without a pickle asks for it")
