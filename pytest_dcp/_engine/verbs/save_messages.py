"""Messages between ranks in a save, compressed: row numbers instead of rows that both sides have.

A rank sends its local plan in full. It gets back its global plan as numbers of its own rows, with
their hints. After writing it sends only the places; the coordinator knows the items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.format import manifest_columns
from pytest_dcp._engine.format.catalog import Catalog, EntryTable
from pytest_dcp._engine.format.compressed_bytes import compress_pieces, decompress
from pytest_dcp._engine.format.write_results import WriteColumns, WriteResults
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.containers import DescribedPaths, description_of
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


BASE_BYTES, BLOCK_BYTES = 8, 64
COMPRESSED_FROM_BYTES = 1 << 20
"""A manifest of 16,384 ranks and 1,000 tensors has a gigabyte, of which each rank gets a copy from
the coordinator: an eighteenth, compressed and without checksums. One that is shorter than this is
sent sooner as it is."""


@dataclass(frozen=True, slots=True)
class EncodedMetadata:
    """Metadata as columns."""

    manifest: bytes
    """A catalog's bytes, without the data of planner and storage; compressed if they are many."""
    compressed_from: int
    """The manifest's bytes before it was compressed; 0 if it was not."""
    python_values: tuple[Any, Any, Any, Mapping[str, Any]]
    """planner_data, storage_meta, version, further attributes."""


@dataclass(frozen=True, slots=True)
class ChangedMetadata:
    """Metadata as its difference from an earlier one that both sides remember."""

    base: bytes
    """The digest of that one's manifest."""
    blocks: NDArray[np.uint32]
    """The blocks in which both manifests differ, of BLOCK_BYTES each: those of the files' names."""
    difference: bytes
    """The exclusive or of these blocks, compressed."""
    python_values: tuple[Any, Any, Mapping[str, Any]]
    """As of `EncodedMetadata`, but for the planner's, which is the same."""


record(CompressedPlan, EncodedMetadata, ChangedMetadata)


def encode_metadata(metadata: Metadata, *, sums: bool = True) -> EncodedMetadata | Metadata:
    """The metadata's columns, if it has any; else the metadata itself.

    sums: whether the receiver needs the checksums of the data. A peer does not: it gets torch's
    metadata, which has none, and a load reads them from the file. They would be most of a message
    that every rank gets.
    """
    if not isinstance(metadata.storage_data, EntryTable):
        return metadata
    catalog = Catalog.of(metadata)
    if not sums:
        catalog = replace(catalog, places=catalog.places.without_sums())
    bare = replace(catalog, planner_data=None, storage_meta=None, version=None, further={})
    python_values = (catalog.planner_data, catalog.storage_meta, catalog.version, catalog.further)
    nbytes = manifest_columns.encoded_length(bare)
    if nbytes < COMPRESSED_FROM_BYTES:
        return EncodedMetadata(manifest_columns.encode(bare), 0, python_values)
    pieces = manifest_columns.encode_pieces(bare)
    return EncodedMetadata(compress_pieces(pieces), nbytes, python_values)


def name_of_base(encoded: EncodedMetadata) -> bytes:
    """The name under which both sides remember the metadata: a digest of its message."""
    digest = hashlib.blake2b(encoded.manifest, digest_size=BASE_BYTES)
    return digest.digest()


def change_metadata(encoded: EncodedMetadata, base: EncodedMetadata) -> ChangedMetadata | None:
    """The difference from an earlier metadata; None if it is no shorter, or would not be exact."""
    paths, *values = encoded.python_values
    new, old = _manifest_of(encoded), _manifest_of(base)
    # In order, too: torch's pickle of the metadata has it.
    same_paths = _paths_in_order(paths) == _paths_in_order(base.python_values[0])
    if len(new) != len(old) or not same_paths:
        return None
    differences = np.bitwise_xor(_blocks_of(new), _blocks_of(old))
    blocks = np.flatnonzero(differences.any(axis=1)).astype(np.uint32)
    difference = compress_pieces([differences[blocks].data])
    if len(difference) + blocks.nbytes >= len(encoded.manifest):
        return None
    return ChangedMetadata(name_of_base(base), blocks, difference, (*values,))


def restore_metadata(changed: ChangedMetadata, base: EncodedMetadata) -> EncodedMetadata:
    """Undo `change_metadata`."""
    if name_of_base(base) != changed.base:
        raise ValueError("the metadata was changed from one that this rank does not have")
    manifest, paths = _manifest_of(base), base.python_values[0]
    blocks = _blocks_of(manifest)
    nbytes = BLOCK_BYTES * len(changed.blocks)
    difference = np.frombuffer(decompress(changed.difference, nbytes), np.uint8)
    blocks[changed.blocks] ^= difference.reshape(-1, BLOCK_BYTES)
    new = blocks.tobytes()[: len(manifest)]
    return EncodedMetadata(new, 0, (copy_paths(paths), *changed.python_values))


def _manifest_of(encoded: EncodedMetadata) -> bytes:
    if encoded.compressed_from:
        return decompress(encoded.manifest, encoded.compressed_from)
    return encoded.manifest


def _blocks_of(manifest: bytes) -> NDArray[np.uint8]:
    """A copy in blocks; zeros fill the last one."""
    blocks = np.zeros((-(-len(manifest) // BLOCK_BYTES), BLOCK_BYTES), np.uint8)
    blocks.reshape(-1)[: len(manifest)] = np.frombuffer(manifest, np.uint8)
    return blocks


def _paths_in_order(paths: Mapping[str, Any] | None) -> tuple[Any, ...]:
    return () if paths is None else (tuple(paths.items()), description_of(paths))


def copy_paths(paths: Any) -> Any:
    """The planner's data in a dict of its own; None and anything but paths as it is."""
    if isinstance(paths, DescribedPaths):
        return DescribedPaths(paths, paths.description)
    return dict(paths) if isinstance(paths, Mapping) else paths


def decode_metadata(encoded: EncodedMetadata | Metadata) -> Metadata:
    """Undo `encode_metadata`."""
    if isinstance(encoded, Metadata):
        return encoded
    manifest = encoded.manifest
    if encoded.compressed_from:
        manifest = decompress(manifest, encoded.compressed_from)
    bare = manifest_columns.decode(memoryview(manifest), _no_pickle)
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
