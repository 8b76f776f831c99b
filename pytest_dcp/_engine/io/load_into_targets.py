"""A load plan -> the planner's targets filled: resolve places -> judge -> plan copies -> execute.

    prepare   resolve  match_entries, resolve_entry_places   items -> rows of the catalog -> places
                       sort_rows                             rows by the way they reach their target
              judge    Work.judge                            values decoded, wrappers compared,
                                                             numbers read: no target has changed
    Work.run  commit   the values and numbers that were judged go to the planner
              plan     copy_plan.copies                      tensors' rows x targets -> copies
              execute  read_copies                           copies -> bytes in the targets

Everything that may not fit its target is read and checked before any target is filled, so a load
that refuses something changes no target. Tensors are filled in place, many at a time if the planner
gives its targets directly; the hooks of other planners are called item by item, in batches of
bounded size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.opaque_values import Copy as WrapperCopy
from pytest_dcp._engine.format.opaque_values import check_wrapper, fill_wrapper
from pytest_dcp._engine.io.checked_ranges import ByteCounts
from pytest_dcp._engine.io.copy_plan import copies
from pytest_dcp._engine.io.disk import Disk
from pytest_dcp._engine.io.entry_places import ResolvedCatalog, resolve_entry_places
from pytest_dcp._engine.io.plan_entries import match_entries, sort_rows
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import ReadSettings, read_copies, read_values
from pytest_dcp._engine.io.stream_transforms import plain_entry, tensor_of
from pytest_dcp._engine.plan.boxes import Ints, volumes
from pytest_dcp._engine.plan.capabilities import numbers_of, prepares_values, targets_of
from pytest_dcp._engine.plan.collector import collector_paused
from pytest_dcp._engine.plan.columns import READ_BYTES, ReadItems
from pytest_dcp._engine.plan.match_keys import together
from pytest_dcp._torch_internals.checkpoint_classes import ExtensionRegistry
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError

BATCH_BYTES = 64 << 20
"""Bytes requested at a time from a planner with its own hooks: it may make a buffer for each
item."""


@dataclass(frozen=True, slots=True)
class LoadedBytes:
    """The result of carrying out a rank's plan."""

    bytes_needed: int = 0
    bytes_read: int = 0
    bytes_verified: int = 0


def prepare(
    disk: Disk,
    folder: Any,
    catalog: Catalog,
    items: ReadItems,
    planner: LoadPlanner,
    settings: ReadSettings,
    registry: ExtensionRegistry,
    observer: Observer,
) -> Work:
    """Read and check everything that may not fit; returns the work of filling the planner's
    targets.

    Values are decoded, numbers that are stored as tensors read, wrappers compared: none of this
    touches a target. Raises CheckpointMismatchError, naming every key that does not fit;
    CheckpointCorruptError naming file, entry and offset if the checkpoint is damaged.
    """
    items = match_entries(items, catalog.index)
    values = items.entry[items.kind == READ_BYTES]
    found = resolve_entry_places(disk, folder, catalog, items.entry, frozenset(values.tolist()))
    work = Work(disk, folder, found, items, planner, settings, registry, observer)
    observer.expect(int(work.nbytes.sum()))
    work.judge()
    return work


class Work:
    """One rank's plan and everything needed to carry it out; made by `prepare`."""

    def __init__(
        self,
        disk: Disk,
        folder: Any,
        found: ResolvedCatalog,
        items: ReadItems,
        planner: LoadPlanner,
        settings: ReadSettings,
        registry: ExtensionRegistry,
        observer: Observer,
    ) -> None:
        self.disk = disk
        self.folder = folder
        self.found = found
        self.catalog = found.catalog
        self.items = items
        self.planner = planner
        self.settings = settings
        self.registry = registry
        self.observer = observer
        self.tally = ByteCounts()
        self.nbytes = self._sizes()
        self._puts: list[Callable[[], None]] = []
        """Receivers of the values, and the function that commits the numbers."""
        self._wrapped: dict[int, tuple[torch.Tensor, list[WrapperCopy]]] = {}
        """By row: the target, and what goes where within it."""
        self.rows = sort_rows(items, found, self._numbers())

    def judge(self) -> None:
        """Read and check everything that may not fit, without changing any target."""
        misfits: list[CheckpointMismatchError] = []
        self._prepare_values(self.rows.values, misfits)
        self._prepare_wrapped(self.rows.wrapped, misfits)
        self._prepare_numbers(self.rows.numbers, misfits)
        if misfits:
            raise together(misfits)

    def run(self) -> LoadedBytes:
        """Fill the targets."""
        for put in self._puts:
            put()
        for row in self.rows.transformed.tolist():
            self.planner.commit_tensor(self.items[row], self._fill_transformed(row))
        for row, (target, parts) in self._wrapped.items():
            self._fill_wrapped(row, target, parts)
        self._fill_tensors(self.rows.tensors)
        return LoadedBytes(int(self.nbytes.sum()), self.tally.read, self.tally.verified)

    def _numbers(self) -> NDArray[np.bool_]:
        """Which rows are numbers for the planner but tensors in the checkpoint."""
        names = numbers_of(self.planner)
        if not names:
            return np.zeros(len(self.items), dtype=bool)
        return np.fromiter((fqn in names for fqn in self.items.fqns), np.bool_, len(self.items))

    def _prepare_values(self, rows: Ints, misfits: list[CheckpointMismatchError]) -> None:
        if not len(rows):
            return
        for row, entry in self._read_stored(rows):
            try:
                self._puts.append(self._prepare_value(row, entry))
            except CheckpointMismatchError as error:
                misfits.append(error)
            del entry  # otherwise it would stay until the next one exists

    def _prepare_wrapped(self, rows: Ints, misfits: list[CheckpointMismatchError]) -> None:
        """Compare the wrappers that torch pickled whole with the targets."""
        for row in rows.tolist():
            item = self.items[row]
            index, stored = self.catalog.index, int(self.items.entry[row])
            if (self.items.shape[row] != index.shape[stored]).any():
                raise CheckpointError(
                    f"{item.dest_index.fqn!r} is stored as a wrapper of other tensors, which can "
                    f"be loaded whole only, not a part of {tuple(item.lengths)}"
                )
            target = self.planner.resolve_tensor(item)
            _check_size(item, target)
            try:
                wrapper = self.found.wrapped[stored]
                parts = check_wrapper(item.dest_index.fqn, target, wrapper)
            except CheckpointMismatchError as error:
                misfits.append(error)
            else:
                self._wrapped[row] = target, parts

    def _prepare_numbers(self, rows: Ints, misfits: list[CheckpointMismatchError]) -> None:
        """Read items that the planner copies from temporary tensors."""
        planner: Any = self.planner
        whole = np.isin(self.items.entry[rows], list(self.catalog.places.transforms))
        targets = self._filled_by_hooks(rows[~whole])
        targets |= {row: self._fill_transformed(row) for row in rows[whole].tolist()}
        for row, target in targets.items():
            item = self.items[row]
            try:
                planner.check_read_number(item, target)
            except CheckpointMismatchError as error:
                misfits.append(error)
            else:
                self._puts.append(partial(planner.commit_tensor, item, target))

    def _fill_transformed(self, row: int) -> torch.Tensor:
        """The target of a tensor whose entry passed through stream transforms: decoded whole."""
        ((_, entry),) = self._read_stored(np.array([row]))
        tensor = tensor_of(entry, self.catalog, int(self.items.entry[row]))
        item = self.items[row]
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        target = self.planner.resolve_tensor(item).detach()
        _check_size(item, target)
        target.copy_(tensor)
        return target

    def _fill_wrapped(self, row: int, target: torch.Tensor, parts: list[WrapperCopy]) -> None:
        item = self.items[row]
        ((_, entry),) = self._read_stored(np.array([row]))
        try:
            fill_wrapper(parts, entry)
        except CheckpointCorruptError as error:
            raise error.at(entry=item.storage_index.fqn) from error
        self.planner.commit_tensor(item, target)

    def _fill_tensors(self, rows: Ints) -> None:
        given = targets_of(self.planner, self.items)
        if given is not None:
            self._copy(self.items, rows, given)
            return
        done = self.nbytes[rows].cumsum() - self.nbytes[rows]
        for batch in np.split(rows, np.flatnonzero(np.diff(done // BATCH_BYTES)) + 1):
            for row, target in self._filled_by_hooks(batch).items():
                self.planner.commit_tensor(self.items[row], target)

    def _filled_by_hooks(self, rows: Ints) -> dict[int, torch.Tensor]:
        """Fill the targets that the planner's hooks give; returns them by row."""
        targets = {row: self.planner.resolve_tensor(self.items[row]) for row in rows.tolist()}
        for row, target in targets.items():
            _check_size(self.items[row], target)
        # The result of resolve_tensor is narrowed already.
        narrowed = replace(self.items, to_offset=np.zeros_like(self.items.to_offset))
        self._copy(narrowed, rows, targets.__getitem__)
        return targets

    def _copy(self, items: ReadItems, rows: Ints, target: Callable[[int], torch.Tensor]) -> None:
        with collector_paused():
            found = copies(items, rows, self.catalog.index, target, self.found.odd_strides)
        self.tally.add(
            read_copies(
                self.disk, self.folder, self.catalog, items, found, self.settings, self.observer
            )
        )

    def _read_stored(self, rows: Ints) -> Iterator[tuple[int, bytes | memoryview]]:
        """Each of these rows with its entry, any stream transforms undone."""
        entries = self.items.entry[rows].tolist()
        found, tally = read_values(
            self.disk, self.folder, self.catalog, entries, self.settings, self.observer
        )
        self.tally.add(tally)
        # One limit for all values: each may be small, and there may be thousands of them.
        left = self.settings.memory.of(sum(map(len, found.values())))
        for row, entry in zip(rows.tolist(), entries, strict=True):
            plain = plain_entry(found[entry], self.catalog, entry, self.registry, left)
            if entry in self.catalog.places.transforms:
                left -= len(plain)
            yield row, plain
            del plain

    def _prepare_value(self, row: int, entry: bytes | memoryview) -> Callable[[], None]:
        """A function that gives the planner the value of a row."""
        planner = self.planner
        if prepares_values(planner):
            return planner.prepare_value(self.items.fqns[row], entry)
        return lambda: planner.load_bytes(self.items[row], io.BytesIO(entry))

    def _sizes(self) -> Ints:
        """Bytes of each row."""
        index, places = self.catalog.index, self.catalog.places
        entry = self.items.entry
        tensors = volumes(self.items.shape) * index.itemsize[index.key_of[entry]]
        return np.where(self.items.kind == READ_BYTES, places.length[entry], tensors)


def _check_size(item: ReadItem, target: torch.Tensor) -> None:
    if target.size() != item.lengths:
        raise ValueError(
            f"req {item.storage_index} mismatch sizes {target.size()} vs {item.lengths}"
        )
