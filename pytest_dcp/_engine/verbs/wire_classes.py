"""The classes of torch and of the engine whose objects ranks send each other, see `wire`.

Pickles are sent only for planners and storages of the user's own classes, whose plans, results and
metadata may hold anything. A rank sends and opens pickles only for its own planner or storage.
"""

from __future__ import annotations

from enum import Enum

from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.coordinate.sent_classes import convert, record
from pytest_dcp._engine.format.catalog import EntryTable
from pytest_dcp._engine.format.planner_paths import PathTable
from pytest_dcp._engine.format.write_results import WriteColumns, WriteResults
from pytest_dcp._engine.plan.cache import Unchanged
from pytest_dcp._engine.plan.capabilities import pickle_choice_of
from pytest_dcp._engine.plan.columns import (
    ReadItems,
    WriteItems,
    rebuilt_reads,
    rebuilt_writes,
)
from pytest_dcp._engine.plan.containers import DescribedPaths
from pytest_dcp._engine.plan.index import ChunkList, Index, KeyTable
from pytest_dcp._engine.plan.packed_names import pack_names, unpack_names
from pytest_dcp._engine.plan.replica_comparison import Checks, Differing
from pytest_dcp._engine.storages.file_names import FileNames
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo, _StoragePrefix

OWN_PACKAGES = ("pytest_dcp", "torch")


def allows_pickles(*owners: object) -> bool:
    """Whether a planner and a storage may have their objects pickled between ranks.

    They may if the class of either is from neither torch nor the engine, unless its attribute
    `pickles_between_ranks` says otherwise. False on either one forbids pickles for both.
    """
    choices = [pickle_choice_of(owner) for owner in owners]
    if False in choices:
        return False
    return True in choices or not all(map(is_known, owners))


def is_known(owner: object) -> bool:
    """Whether the object's class is from torch or the engine."""
    return type(owner).__module__.partition(".")[0] in OWN_PACKAGES


def _named_items(kind: type[Enum]) -> None:
    convert(kind, lambda item: item.name, lambda name: kind[name])


record(
    *(SavePlan, LoadPlan, WriteItem, ReadItem, TensorWriteData, BytesIOWriteData, WriteResult),
    *(Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata),
    *(BytesStorageMetadata, ChunkStorageMetadata, _StorageInfo, _StoragePrefix, FileNames),
    *(Unchanged, WriteColumns, Checks, Differing),
)
_named_items(WriteItemType)
_named_items(LoadItemType)
convert(
    WriteItems,
    lambda table: (pack_names(table.fqns), table.sent_fields()),
    lambda parts: rebuilt_writes(*parts),
)
convert(
    ReadItems,
    lambda table: (pack_names(table.fqns), pack_names(table.stored_fqns), table.sent_fields()),
    lambda parts: rebuilt_reads(*parts),
)


convert(
    WriteResults,
    lambda some: (some.items, some.written) if some.is_untouched() else list(some),
    lambda parts: WriteResults(*parts) if isinstance(parts, tuple) else parts,
)
convert(
    Index,
    lambda index: (pack_names(index.fqns), index.sent_fields()),
    lambda parts: Index(fqns=unpack_names(parts[0]), **parts[1]),
)
convert(
    KeyTable,
    lambda table: table.index() or dict(table),
    lambda parts: KeyTable(parts) if isinstance(parts, Index) else parts,
)
convert(ChunkList, list)
for _mapping in (DescribedPaths, EntryTable, PathTable):
    convert(_mapping, dict)
