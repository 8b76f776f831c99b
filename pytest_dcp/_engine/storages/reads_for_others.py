"""The hooks of a reader of folders by which ranks read for each other: a `SharesReads`.

    unlocated_entries, locate_entries   entries of torch's: where is their data?
    offer_reads                         a plan -> its work, and the ranges of bytes that it wants
    share_reads                         what the coordinator made of all offers -> the work

`prepare_data` and `read_data` then carry out the work that was offered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.disk import Disk, is_remote
from pytest_dcp._engine.io.entry_places import (
    LocatedEntries,
    resolve_entry_places,
    unlocated_tensors,
)
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.plan_entries import match_entries
from pytest_dcp._engine.io.shared_reading import ByteChannel, SharedReads
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.columns import READ_BYTES, ReadItems
from pytest_dcp._engine.plan.shared_reads import ReadShare, Wants
from pytest_dcp._engine.storages.load_into_targets import Work


class ReadsForOthers:
    """The part of a reader of folders that reads ranges for other ranks."""

    path: str | os.PathLike[str]
    _metadata: Metadata | None
    _offered: tuple[LoadPlan, Work, Wants] | None = None
    """The result of `offer_reads`, for the plan passed to it."""

    @property
    def is_far(self) -> bool:
        """Whether the files are in an object store or on a network file system."""
        return is_remote(self._disk(), self.path)

    def may_share_reads(self) -> bool:
        """Whether ranges of the files can be read for other ranks: not if a subclass reads, or
        changes what is read."""
        return not self._overrides_streams() and not self._overrides_read_data()

    def unlocated_entries(self, plan: LoadPlan) -> Ints:
        """The entries of a plan that must be parsed before it is known where their data is."""
        catalog = self._planned_catalog()
        items = match_entries(ReadItems.of(plan.items), catalog.index)
        return unlocated_tensors(catalog, items.entry[items.kind != READ_BYTES])

    def locate_entries(self, entries: Ints) -> LocatedEntries:
        """Find the data of some entries, for all ranks."""
        with self._noticing_a_replacement():
            found = resolve_entry_places(self._folder(), self._planned_catalog(), entries)
        return LocatedEntries.of(found, entries)

    def offer_reads(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        capabilities: LoadPlannerCapabilities,
        located: Sequence[LocatedEntries],
        *,
        insist: bool,
    ) -> Wants:
        """The ranges of bytes of a plan that other ranks may want, too; nothing is read yet.

        located: what all ranks have found by `locate_entries`. insist: as for `Work.offer`.
        """
        with self._noticing_a_replacement():
            catalog = self._planned_catalog()
            work = self._work_of(catalog, plan, planner, capabilities, located)
            wants = work.offer(insist=insist)
        self._offered = plan, work, wants
        return wants

    def share_reads(self, rank: int, share: ReadShare, channel: ByteChannel) -> None:
        """Read the offered plan together with the other ranks of the share."""
        if self._offered is None:
            raise ValueError("offer_reads must be called before share_reads")
        _, work, wants = self._offered
        work.shared = SharedReads(rank, wants, share, channel)

    def _take_offered(self, plan: LoadPlan) -> Work | None:
        """The work that was made by `offer_reads` for this plan."""
        offered, self._offered = self._offered, None
        return offered[1] if offered is not None and offered[0] is plan else None

    def _planned_catalog(self) -> Catalog:
        if self._metadata is None:
            raise ValueError("set_up_storage_reader must be called before ranks share reads")
        return self._catalog_of(self._metadata)

    # Of the reader.

    def _disk(self) -> Disk:
        raise NotImplementedError

    def _folder(self) -> Folder:
        raise NotImplementedError

    def _catalog_of(self, metadata: Metadata) -> Catalog:
        raise NotImplementedError

    def _work_of(
        self,
        catalog: Catalog,
        plan: LoadPlan,
        planner: LoadPlanner,
        capabilities: LoadPlannerCapabilities,
        located: Sequence[LocatedEntries] = (),
    ) -> Work:
        raise NotImplementedError

    def _overrides_streams(self) -> bool:
        raise NotImplementedError

    def _overrides_read_data(self) -> bool:
        raise NotImplementedError

    def _noticing_a_replacement(self) -> AbstractContextManager[None]:
        raise NotImplementedError
