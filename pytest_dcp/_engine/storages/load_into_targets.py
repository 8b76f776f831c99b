"""A load plan -> the planner's targets filled: resolve places -> judge -> plan copies -> execute.

    prepare   resolve  io.stored_items      items -> rows of the catalog -> places
                       io.plan_entries      rows by the way they reach their target
              judge    Work.judge           values decoded, wrappers compared, numbers read: no
                                            target has changed
    Work.run  commit   the values and numbers that were judged go to the planner
              targets  the planner's tensors, as a table of rows and memory
              plan     io.copy_plan         tensors' rows x targets -> copies
              execute  io.read_copies       copies -> bytes in the targets

This module alone speaks with the planner: what it answers goes to `io` as values, so every call
leads downwards.

Everything that may not fit its target is read and checked before any target is filled, so a load
that refuses something changes no target. Tensors are filled in place, many at a time if the planner
gives its targets directly; the hooks of other planners are called item by item, in batches of
bounded size.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.planner import LoadPlanner

from pytest_dcp._engine.format.opaque_values import describe_target, misfit
from pytest_dcp._engine.io.bucket_reading import BucketSource
from pytest_dcp._engine.io.copy_plan import Targets
from pytest_dcp._engine.io.plan_entries import sort_rows
from pytest_dcp._engine.io.read_copies import check_values
from pytest_dcp._engine.io.shared_reading import SharedReads
from pytest_dcp._engine.io.stored_items import ItemSource, StoredItems, check_size, resolve_items
from pytest_dcp._engine.io.wanted_ranges import LoadPhase, offer_ranges
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.match_keys import merge_errors
from pytest_dcp._engine.plan.shared_reads import Wants
from pytest_dcp._engine.planners.load_capabilities import numbers_of, targets_of, wrappers_of
from pytest_dcp._engine.storages.wrapped_rows import Fill, judge_wrapper
from pytest_dcp.errors import CheckpointMismatchError
from pytest_dcp.garbage_collection import collector_paused

BATCH_BYTES = 64 << 20
"""Bytes requested at a time from a planner with its own hooks: it may make a buffer for each
item."""


@dataclass(frozen=True, slots=True)
class LoadedBytes:
    """The result of carrying out a rank's plan."""

    bytes_needed: int = 0
    bytes_read: int = 0
    bytes_verified: int = 0


def resolve(
    source: ItemSource,
    items: ReadItems,
    planner: LoadPlanner,
    capabilities: LoadPlannerCapabilities,
) -> Work:
    """The work of filling the planner's targets: `judge` and `run` are to be called."""
    work = Work(resolve_items(source, items), planner, capabilities)
    source.observer.expect(int(work.stored.nbytes.sum()))
    return work


class Work:
    """One rank's plan and everything needed to carry it out; made by `prepare`."""

    def __init__(
        self, stored: StoredItems, planner: LoadPlanner, capabilities: LoadPlannerCapabilities
    ) -> None:
        self.stored = stored
        self.items = stored.items
        self.planner: Any = planner
        self.capabilities = capabilities
        self._puts: list[Callable[[], None]] = []
        """Receivers of the values, and the function that commits the numbers."""
        self._wrapped: dict[int, Fill] = {}
        """By row."""
        self.rows = sort_rows(self.items, stored.found, self._numbers())
        self.shared: SharedReads | None = None
        """The reads that this rank shares with others, if there are any."""

    def offer(self, *, insist: bool) -> Wants:
        """The ranges of bytes that other ranks may want, too.

        insist: also those of a planner that may make a buffer for each item: its buffers are then
            all made at once.
        """
        tensors = self.rows.tensors
        if not insist and targets_of(self.planner, self.items) is None:
            tensors = tensors[:0]
        return offer_ranges(self.stored, self.rows.values, self.rows.transformed, tensors)

    def judge(self) -> None:
        """Read and check everything that may not fit, without changing any target.

        Values are decoded, numbers that are stored as tensors read, wrappers compared. Raises
        CheckpointMismatchError, naming every key that does not fit; CheckpointCorruptError naming
        file, entry and offset if the checkpoint is damaged.
        """
        misfits: list[CheckpointMismatchError] = []
        if self.shared is not None:
            self._receive_values(self.shared)
        self._prepare_values(self.rows.values, misfits)
        self._prepare_wrapped(self.rows.wrapped, misfits)
        self._prepare_numbers(self.rows.numbers, misfits)
        self._refuse_plain(misfits)
        if misfits:
            raise merge_errors(misfits)

    def run(self) -> LoadedBytes:
        """Fill the targets."""
        for put in self._puts:
            put()
        for row, fill in self._wrapped.items():
            self.planner.commit_tensor(self.items[row], fill(self._entry_of(row)))
        if self.shared is None:
            self._fill_decoded(self.rows.transformed)
            self._fill_tensors(self.rows.tensors)
        else:
            self._fill_shared(self.shared)
        tally = self.stored.tally
        return LoadedBytes(int(self.stored.nbytes.sum()), tally.read, tally.verified)

    # Shared reads.

    def _receive_values(self, shared: SharedReads) -> None:
        """Read the values that other ranks want, too, together with them."""
        stored, source = self.stored, self.stored.source
        entries = np.unique(self.items.entry[self.rows.values]).tolist()
        check_values(source.folder, stored.catalog, entries, source.settings, source.observer)
        sizes = {entry: int(stored.catalog.places.data_nbytes[entry]) for entry in entries}
        found, tally = shared.read_entries(self._bucket_source(), sizes)
        stored.received.update(found)
        stored.tally.add(tally)

    def _bucket_source(self) -> BucketSource:
        source = self.stored.source
        return BucketSource(
            source.folder, self.stored.catalog, self.items, source.settings, source.observer
        )

    def _fill_shared(self, shared: SharedReads) -> None:
        """Fill all tensors; those that other ranks want, too, together with them."""
        decoded: dict[int, list[int]] = {}
        alone = []
        for row in self.rows.transformed.tolist():
            entry = int(self.items.entry[row])
            if shared.covers(LoadPhase.TENSORS, entry):
                decoded.setdefault(entry, []).append(row)
            else:
                alone.append(row)
        self._fill_decoded(np.array(alone, dtype=np.int64))
        whole = {
            entry: partial(self._decode_received, entry, rows) for entry, rows in decoded.items()
        }
        rows = self.rows.tensors
        target = targets_of(self.planner, self.items)
        if target is not None:
            with collector_paused():
                tensors = list(map(target, rows.tolist()))
            self.stored.tally.add(
                shared.fill(self.stored.request_of(Targets(rows, tensors)), whole)
            )
            return
        targets = self._targets_by_hooks(rows)
        request = self.stored.request_of(Targets(rows, list(targets.values())), narrowed=True)
        self.stored.tally.add(shared.fill(request, whole))
        for row, filled in targets.items():
            self.planner.commit_tensor(self.items[row], filled)

    def _decode_received(self, entry: int, rows: list[int], data: memoryview) -> None:
        """Fill the targets of an entry that must be decoded."""
        self.stored.received[entry] = data
        self._fill_decoded(np.array(rows, dtype=np.int64))
        del self.stored.received[entry]

    # Rows by kind.

    def _fill_decoded(self, rows: Ints) -> None:
        for row in rows.tolist():
            self.planner.commit_tensor(self.items[row], self._fill_transformed(row))

    def _numbers(self) -> NDArray[np.bool_]:
        """Which rows are numbers for the planner but tensors in the checkpoint."""
        names = numbers_of(self.planner)
        if not names:
            return np.zeros(len(self.items), dtype=bool)
        return np.fromiter((fqn in names for fqn in self.items.fqns), np.bool_, len(self.items))

    def _prepare_values(self, rows: Ints, misfits: list[CheckpointMismatchError]) -> None:
        if not len(rows):
            return
        for row, entry in self.stored.read_entries(rows):
            try:
                self._puts.append(self._prepare_value(row, entry))
            except CheckpointMismatchError as error:
                misfits.append(error)
            del entry  # otherwise it would stay until the next one exists

    def _prepare_value(self, row: int, entry: bytes | memoryview) -> Callable[[], None]:
        """A function that gives the planner the value of a row."""
        planner = self.planner
        if self.capabilities.prepares_values:
            prepared: Callable[[], None] = planner.prepare_value(self.items.fqns[row], entry)
            return prepared
        return lambda: planner.load_bytes(self.items[row], io.BytesIO(entry))

    def _prepare_wrapped(self, rows: Ints, misfits: list[CheckpointMismatchError]) -> None:
        """Compare the wrappers that torch pickled whole with the targets."""
        for row in rows.tolist():
            stored = self.stored.found.wrapped[int(self.items.entry[row])]
            read = partial(self._entry_of, row)
            try:
                self._wrapped[row] = judge_wrapper(self.planner, self.items[row], stored, read)
            except CheckpointMismatchError as error:
                misfits.append(error)

    def _refuse_plain(self, misfits: list[CheckpointMismatchError]) -> None:
        """Refuse stored plain tensors whose target is a wrapper of other tensors."""
        names = wrappers_of(self.planner)
        if not names:
            return
        index = self.stored.catalog.index
        for row in np.concatenate((self.rows.tensors, self.rows.transformed)).tolist():
            fqn, entry = self.items.fqns[row], int(self.items.entry[row])
            if fqn in names:
                dtype = index.properties[index.property_of[index.key_of[entry]]].dtype
                target = self.planner.lookup_tensor(self.items[row].dest_index)
                box = f"at {tuple(self.items[row].storage_index.offset or ())}"
                there = f"stored as plain elements of {dtype} {box}"
                misfits.append(misfit(fqn, there, describe_target(target)))

    def _entry_of(self, row: int) -> bytes | memoryview:
        ((_, entry),) = self.stored.read_entries(np.array([row]))
        return entry

    def _prepare_numbers(self, rows: Ints, misfits: list[CheckpointMismatchError]) -> None:
        """Read items that the planner copies from temporary tensors."""
        if not len(rows):
            return  # as in most loads, which would plan copies for nothing
        planner = self.planner
        places = self.stored.catalog.places
        decoded = np.isin(self.items.entry[rows], list(places.transforms))
        targets = self._fill_by_hooks(rows[~decoded])
        targets |= {row: self._fill_transformed(row) for row in rows[decoded].tolist()}
        for row, target in targets.items():
            item = self.items[row]
            try:
                planner.check_read_number(item, target)
            except CheckpointMismatchError as error:
                misfits.append(error)
            else:
                self._puts.append(partial(planner.commit_tensor, item, target))

    def _fill_transformed(self, row: int) -> torch.Tensor:
        """Fill the target of a tensor whose entry passed through stream transforms; returns it."""
        tensor = self.stored.decode_tensor(row)
        target: torch.Tensor = self.planner.resolve_tensor(self.items[row]).detach()
        check_size(self.items[row], target)
        target.copy_(tensor)
        return target

    def _fill_tensors(self, rows: Ints) -> None:
        target = targets_of(self.planner, self.items)
        if target is not None:
            with collector_paused():
                tensors = list(map(target, rows.tolist()))
            self.stored.read_into(Targets(rows, tensors))
            return
        nbytes = self.stored.nbytes[rows]
        start_bytes = nbytes.cumsum() - nbytes
        for batch in np.split(rows, np.flatnonzero(np.diff(start_bytes // BATCH_BYTES)) + 1):
            for row, filled in self._fill_by_hooks(batch).items():
                self.planner.commit_tensor(self.items[row], filled)

    def _fill_by_hooks(self, rows: Ints) -> dict[int, torch.Tensor]:
        """Fill the targets that the planner's hooks give; returns them by row."""
        targets = self._targets_by_hooks(rows)
        self.stored.read_into(Targets(rows, list(targets.values())), narrowed=True)
        return targets

    def _targets_by_hooks(self, rows: Ints) -> dict[int, torch.Tensor]:
        targets = {row: self.planner.resolve_tensor(self.items[row]) for row in rows.tolist()}
        for row, target in targets.items():
            check_size(self.items[row], target)
        return targets
