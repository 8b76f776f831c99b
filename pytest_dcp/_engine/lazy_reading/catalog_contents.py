"""Checkpoints whose index is a catalog: those of this engine, of torch, and of safetensors files.

An open checkpoint stays the save that it was when it was opened:

- While the index is read and the data files are opened, a lease holds off other commits. Local
  files stay open, up to `KEPT_FILES` of them, and an open file is readable after it was removed.
- The file of a large index stays open, too, until all of it was read or the catalog is dropped: the
  shards of a tensor are known after `close`, though no data is read any more.
- Of the other files, and in object stores, another save may remove some: their reads raise
  CheckpointReplacedError, as no file of ours is ever written again under its name.
- torch's own saves write over the files in place. If size or time of a file that is kept open
  differ from those at the opening, a read raises CheckpointReplacedError.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.paged_catalog import select_part
from pytest_dcp._engine.format.python_values import decode_value
from pytest_dcp._engine.io.copy_plan import Targets
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp._engine.io.open_files import OpenFiles
from pytest_dcp._engine.io.plan_entries import sort_rows
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import ReadSettings
from pytest_dcp._engine.io.stored_items import ItemSource, StoredItems, resolve_items
from pytest_dcp._engine.io.transformed_entries import tensor_of
from pytest_dcp._engine.lazy_reading.contents import BoxToRead, StoredShard, TensorFacts
from pytest_dcp._engine.lazy_reading.delayed_close import DelayedClose
from pytest_dcp._engine.lazy_reading.megatron_common import read_common
from pytest_dcp._engine.lazy_reading.save_identity import FileIdentity, identify_save
from pytest_dcp._engine.lazy_reading.stored_wrappers import (
    Entry,
    StoredWrapper,
    describe_wrapper,
    find_wrapper,
    wrapper_text,
)
from pytest_dcp._engine.plan.boxes import pad_rows, volumes
from pytest_dcp._engine.plan.columns import size_of
from pytest_dcp._engine.plan.containers import description_of
from pytest_dcp._engine.plan.describe import Wanted
from pytest_dcp._engine.plan.load import read_items
from pytest_dcp._engine.storages.folder_metadata import save_of, verify_metadata
from pytest_dcp._torch_internals.checkpoint_classes import ExtensionRegistry
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointFileMissingError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    UntrustedPickleError,
)

KEPT_FILES = 256
"""Local files that one checkpoint keeps open: a process has 1,024 descriptors by default, and may
open several checkpoints."""

DATA_SUFFIXES = (".distcp", ".safetensors", ".tmp")
"""Of files that only checkpoints write, in folders that may also hold configurations."""

_VALUE = None
"""The shape of a value's entry: none."""


class CatalogContents:
    """A catalog, and the folder with its data files."""

    has_checksums = False  # The catalog says which parts have some.

    def __init__(
        self,
        folder: Folder,
        catalog: Catalog,
        settings: ReadSettings,
        find_current: Callable[[], Catalog],
        index_name: str | None = None,
    ) -> None:
        """Opens the data files that are kept open.

        find_current: reads the catalog of the folder's checkpoint as it is then. index_name: of its
        metadata file, if it has one.
        """
        self.bytes_read = self.bytes_needed = 0
        self.missing_files: list[str] = []
        """Data files that were not there at the opening."""
        self._catalog = catalog
        self._settings = settings
        self._registry = ExtensionRegistry()
        self._find_current = find_current
        self._index_name = index_name
        self._folder = folder
        self._open_files: OpenFiles | None = None
        self._identities: dict[str, tuple[LocalIn, FileIdentity]] = {}
        if isinstance(folder.disk, LocalDisk):
            self._open_files = OpenFiles(folder.disk, folder.path, most=KEPT_FILES)
            self._folder = Folder(self._open_files, folder.path)
            self._keep_files(self._open_files)
        self._decoded = _DecodedShard()
        self._closing = DelayedClose(str(folder), self._close_files)

    @property
    def names(self) -> Sequence[str]:
        """The flat names, in the checkpoint's order."""
        return self._catalog.index.fqns

    def has(self, name: str) -> bool:
        """Whether it has this name."""
        return self._catalog.index.find_row(name) is not None

    def describe(self, name: str) -> TensorFacts | None:
        """The tensor of this name; None if it is a value."""
        index = self._catalog.index
        row = self._row_of(name)
        ndim = int(index.ndim[row])
        if ndim < 0:
            return None
        dtype = index.properties[index.property_of[row]].dtype
        return TensorFacts(tuple(size_of(index.size[row], ndim)), dtype)

    def shards(self, name: str) -> tuple[StoredShard, ...]:
        """The stored boxes of a tensor."""
        part = self._part([name])
        index, places = part.index, part.places
        ndim, width = int(index.ndim[0]), int(index.itemsize[0])
        nbytes = (volumes(index.shape) * width).tolist()
        files = [places.files[n] if n >= 0 else None for n in places.file.tolist()]
        boxes = zip(index.offset.tolist(), index.shape.tolist(), files, nbytes, strict=True)
        return tuple(
            StoredShard(tuple(offset[:ndim]), tuple(shape[:ndim]), file, size)
            for offset, shape, file, size in boxes
        )

    def count_shards(self, name: str) -> int:
        """How many boxes a tensor is stored in."""
        index = self._catalog.index
        row = index.row_of[name]
        return int(index.first[row + 1] - index.first[row])

    def stored_nbytes(self, name: str) -> int:
        """Bytes of the tensor's stored elements, or of the value's entries."""
        facts = self.describe(name)
        if facts is not None:
            return sum(shard.nbytes for shard in self.shards(name))
        return int(np.maximum(self._part([name]).places.length, 0).sum())

    def read_boxes(self, boxes: Sequence[BoxToRead]) -> None:
        """Fill the targets. Raises CheckpointCorruptError naming file, entry and offset."""
        if not boxes:
            return
        with self._noticing_a_replacement([box.name for box in boxes]) as catalog:
            items = read_items(_describe_boxes(boxes, catalog.index.offset.shape[1]), catalog.index)
            stored = resolve_items(self._source(catalog), items)
            self._fill(stored, boxes)
        self.bytes_needed += int(stored.nbytes.sum())
        self.bytes_read += stored.tally.read

    def read_value(self, name: str, *, weights_only: bool = True) -> Any:
        """The value of this name, which runs no code unless `weights_only` is False."""
        entry = self._read_entry(name, _VALUE, 0)
        try:
            return decode_value(entry, weights_only=weights_only)
        except UntrustedPickleError as error:
            wrapper = find_wrapper(entry)
            if wrapper is not None:
                raise UntrustedPickleError(wrapper_text(name, wrapper.kind), entry=name) from error
            raise error.at(entry=name) from error
        except CheckpointCorruptError as error:
            raise error.at(entry=name) from error

    def wrappers(self, name: str) -> tuple[StoredWrapper, ...]:
        """The wrappers of other tensors that the tensor or value is stored as. Of a value its entry
        is read."""
        facts = self.describe(name)
        if facts is None:
            read = partial(self._read_entry, name, _VALUE, 0)
            if (wrapper := find_wrapper(read())) is None:
                return ()
            return (describe_wrapper(name, wrapper, (0,) * len(wrapper.shape), read),)
        shape = facts.shape
        with self._noticing_a_replacement([name]) as catalog:
            stored = self._resolve(catalog, name, shape)
        found = []
        for row, entry_row in enumerate(stored.items.entry.tolist()):
            if (wrapper := stored.found.wrapped.get(entry_row)) is not None:
                offset = tuple(stored.items.stored[row, : len(shape)].tolist())
                read = partial(self._read_entry, name, shape, row)
                found.append(describe_wrapper(name, wrapper, offset, read))
        return tuple(found)

    def _read_entry(self, name: str, shape: tuple[int, ...] | None, nth: int) -> Entry:
        """The nth entry of a tensor of this shape, or of a value."""
        with self._noticing_a_replacement([name]) as catalog:
            stored = self._resolve(catalog, name, shape)
            ((_, entry),) = stored.read_entries(np.array([nth], dtype=np.int64))
        self.bytes_needed += int(stored.nbytes[nth])
        self.bytes_read += stored.tally.read
        return entry

    def _resolve(self, catalog: Catalog, name: str, shape: tuple[int, ...] | None) -> StoredItems:
        """All entries of a tensor of this shape, or of a value, with their places."""
        sides = np.array([shape or ()], dtype=np.int64).reshape(1, -1)
        whole = Wanted(
            fqns=(name,),
            ndim=np.array([-1 if shape is None else len(shape)], dtype=np.int16),
            offset=np.zeros_like(sides),
            shape=sides,
            nth=np.zeros(1, dtype=np.int64),
        )
        return resolve_items(self._source(catalog), read_items(whole, catalog.index))

    def read_common(self) -> dict[str, Any]:
        """The values in Megatron-Core's `common.pt` beside the index; empty without the file."""
        with self._closing.keep_open():
            return read_common(self._folder, self._settings.memory)

    def file_names(self) -> Sequence[str]:
        """The data files, relative to the checkpoint's folder."""
        return self._catalog.places.files

    def path_of(self, name: str) -> tuple[Any, ...]:
        """The keys from the root of the saved state dict to this value."""
        paths = self._catalog.planner_data
        path = paths.get(name) if isinstance(paths, Mapping) else None
        is_path = isinstance(path, tuple | list) and all(isinstance(k, str | int) for k in path)
        return tuple(path or ()) if is_path and path else (name,)

    @property
    def containers(self) -> str | None:
        """The description of the saved containers; None: plain ones."""
        return description_of(self._catalog.planner_data)

    @property
    def catalog(self) -> Catalog:
        """Its index and checksums."""
        return self._catalog

    def identify(self) -> str:
        """A text that differs for another save in the same place."""
        times = {name: identity for name, (_, identity) in self._identities.items()}
        return identify_save(self._catalog, times)

    def verify_index(self) -> None:
        """Check the bytes of its index that no read looks at. Raises CheckpointCorruptError naming
        the file."""
        if self._index_name is not None:
            verify_metadata(self._folder, self._index_name)

    def find_stray_files(self) -> Sequence[str]:
        """Files of the folder that the checkpoint does not name, but for hidden ones."""
        own_files = set(self._catalog.places.files)
        others = (name for name in self._folder.names() if name not in own_files)
        return sorted(name for name in others if name.endswith(DATA_SUFFIXES))

    def close(self) -> None:
        """Close the files. Later reads raise."""
        self._closing.close()

    def is_replaced(self) -> bool:
        """Whether the folder's checkpoint is another save's than the one opened."""
        try:
            now = self._find_current().storage_meta
        except (OSError, CheckpointCorruptError):
            return False
        return save_of(now) != save_of(self._catalog.storage_meta)

    def replaced_error(self) -> CheckpointReplacedError:
        """The error of a read that came too late."""
        return CheckpointReplacedError(
            f"the checkpoint in {self._folder} was replaced or written over since it was opened: "
            "open it again"
        )

    def _keep_files(self, files: OpenFiles) -> None:
        for name in self._catalog.places.files:
            try:
                file = files.keep(name)
            except FileNotFoundError:
                self.missing_files.append(name)
            except (OSError, CheckpointCorruptError):
                continue  # Its reads say what is wrong with it.
            else:
                if isinstance(file, LocalIn):
                    self._identities[name] = file, _identity(os.fstat(file.fd))

    def _close_files(self) -> None:
        self._identities.clear()
        self._decoded = _DecodedShard()
        if self._open_files is not None:
            self._open_files.close()

    def _part(self, names: Sequence[str]) -> Catalog:
        keys = np.array([self._row_of(name) for name in dict.fromkeys(names)], dtype=np.int64)
        return select_part(self._catalog, keys)

    def _row_of(self, name: str) -> int:
        row = self._catalog.index.find_row(name)
        if row is None:
            raise KeyError(name)
        return row

    def _source(self, catalog: Catalog) -> ItemSource:
        return ItemSource(self._folder, catalog, self._settings, self._registry, Observer("load"))

    def _fill(self, stored: StoredItems, boxes: Sequence[BoxToRead]) -> None:
        items = stored.items
        rows = sort_rows(items, stored.found, np.zeros(len(items), dtype=bool))
        if len(rows.wrapped):
            row = int(rows.wrapped[0])
            fqn, wrapper = items.fqns[row], stored.found.wrapped[int(items.entry[row])]
            raise CheckpointMismatchError(wrapper_text(fqn, wrapper.kind), mismatched=(fqn,))
        nth: list[int] = items.wanted_hint.tolist()
        targets = [boxes[nth[row]].target for row in rows.tensors.tolist()]
        stored.read_into(Targets(rows.tensors, targets))
        for row in rows.transformed.tolist():
            part = boxes[nth[row]].target
            for dim in range(int(items.ndim[row])):
                start, length = int(items.to_offset[row, dim]), int(items.shape[row, dim])
                part = part.narrow(dim, start, length)
            part.copy_(self._decode_part(stored, row))

    def _decode_part(self, stored: StoredItems, row: int) -> torch.Tensor:
        """The part that a row wants of a shard that passed through stream transforms.

        A shard is decoded whole. It is kept for this thread's next part, until its end was read:
        a conversion asks for a large one in hundreds of parts, one after another.
        """
        item, entry_row = stored.items[row], int(stored.items.entry[row])
        places, last = stored.catalog.places, self._decoded
        key = places.files[int(places.file[entry_row])], int(places.start[entry_row])
        shard = last.shard
        if shard is None or last.key != key:
            last.shard = None
            ((_, entry),) = stored.read_entries(np.array([row]))
            shard = tensor_of(entry, stored.catalog, entry_row)
        part = shard
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        ends = map(sum, zip(item.storage_offsets, item.lengths, strict=True))
        has_rest = any(end < side for end, side in zip(ends, shard.shape, strict=True))
        last.key, last.shard = key, shard if has_rest else None
        return part

    @contextlib.contextmanager
    def _noticing_a_replacement(self, names: Sequence[str]) -> Iterator[Catalog]:
        """Read inside from the catalog of these names; raises if the save is no longer there."""
        with self._closing.keep_open():
            part = self._part(names)
            try:
                yield part
            except CheckpointFileMissingError as error:
                if self.is_replaced():
                    raise self.replaced_error() from error
                raise
            numbers = np.unique(part.places.file)
            used = [part.places.files[n] for n in numbers[numbers >= 0].tolist()]
            if not all(map(self._is_unchanged, used)):
                raise self.replaced_error()

    def _is_unchanged(self, name: str) -> bool:
        """Whether a file that is kept open is as it was at the opening."""
        if name not in self._identities:
            return True
        file, identity = self._identities[name]
        return _identity(os.fstat(file.fd)) == identity


class _DecodedShard(threading.local):
    """The last shard that a thread decoded, if it may want more of it."""

    key: tuple[str, int] | None = None
    """Its file, and where in it the shard begins."""
    shard: torch.Tensor | None = None


def _identity(status: os.stat_result) -> FileIdentity:
    """Changes if the file is written to."""
    return status.st_size, status.st_mtime_ns


def _describe_boxes(boxes: Sequence[BoxToRead], rank: int) -> Wanted:
    return Wanted(
        fqns=tuple(box.name for box in boxes),
        ndim=np.array([box.target.dim() for box in boxes], dtype=np.int16),
        offset=pad_rows([box.offset for box in boxes], rank, 0),
        shape=pad_rows([tuple(box.target.shape) for box in boxes], rank, 1),
        nth=np.arange(len(boxes), dtype=np.int64),
    )
