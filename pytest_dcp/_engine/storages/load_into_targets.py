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
from pytest_dcp._engine.io.copy_plan import Targets
from pytest_dcp._engine.io.plan_entries import sort_rows
from pytest_dcp._engine.io.stored_items import ItemSource, StoredItems, check_size, resolve_items
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.match_keys import merge_errors
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


def prepare(
    source: ItemSource,
    items: ReadItems,
    planner: LoadPlanner,
    capabilities: LoadPlannerCapabilities,
) -> Work:
    """Read and check everything that may not fit; returns the work of filling the planner's
    targets.

    Values are decoded, numbers that are stored as tensors read, wrappers compared: none of this
    touches a target. Raises CheckpointMismatchError, naming every key that does not fit;
    CheckpointCorruptError naming file, entry and offset if the checkpoint is damaged.
    """
    work = Work(resolve_items(source, items), planner, capabilities)
    source.observer.expect(int(work.stored.nbytes.sum()))
    work.judge()
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

    def judge(self) -> None:
        """Read and check everything that may not fit, without changing any target."""
        misfits: list[CheckpointMismatchError] = []
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
        for row in self.rows.transformed.tolist():
            self.planner.commit_tensor(self.items[row], self._fill_transformed(row))
        for row, fill in self._wrapped.items():
            self.planner.commit_tensor(self.items[row], fill(self._entry_of(row)))
        self._fill_tensors(self.rows.tensors)
        tally = self.stored.tally
        return LoadedBytes(int(self.stored.nbytes.sum()), tally.read, tally.verified)

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
        targets = {row: self.planner.resolve_tensor(self.items[row]) for row in rows.tolist()}
        for row, target in targets.items():
            check_size(self.items[row], target)
        self.stored.read_into(Targets(rows, list(targets.values())), narrowed=True)
        return targets
