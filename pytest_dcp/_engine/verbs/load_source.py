"""A storage reader as a load uses it.

Every reader has torch's hooks, the older ones with fewer parameters. A reader with the capabilities
of `plan.storage_capabilities` does more: it holds a lease, keeps files open, and judges values
before anything changes. A load calls readers only through this module, so the other modules need
not know which kind it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader

from pytest_dcp._engine.coordinate import Team
from pytest_dcp._engine.io.shared_reading import ByteChannel
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.columns import has_values
from pytest_dcp._engine.plan.hooks import require_complete
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.plan.shared_reads import ReadShare, Wants
from pytest_dcp._engine.plan.storage_capabilities import (
    SharesReads,
    ignores_plans,
    keeps_files,
    knows_saves,
    may_hold_wrappers,
    place_of,
    prepares_data,
    shares_reads,
    verifies_bytes,
)
from pytest_dcp._engine.storages.folder_metadata import save_of
from pytest_dcp._engine.verbs.compare_ranks import Found
from pytest_dcp._engine.verbs.shared_reading import Read, SharingWish, wish_of
from pytest_dcp._engine.verbs.torch_arguments import accepts_parameter
from pytest_dcp.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    """The checkpoint that a rank has found."""

    metadata: Metadata
    of_all_ranks: bool
    """False where this rank has saved on its own."""
    save_id: str | None
    """None if the ranks' ids need not be equal."""


class LoadSource:
    """One reader, for one load."""

    def __init__(self, reader: StorageReader) -> None:
        self.reader = reader
        self._files = reader if keeps_files(reader) else None
        self.place = place_of(reader)
        """The folder, as the load began; None if the reader names none."""

    @property
    def where(self) -> object:
        """The folder, or the reader itself if it names none."""
        return self.place or self.reader

    @property
    def plans_alone(self) -> bool:
        """Whether the reader does not want to see the plans of all ranks."""
        return ignores_plans(self.reader)

    def find(self, rank: int, lease: ExitStack | None) -> FoundCheckpoint:
        """Read the metadata; files that are opened from now on stay open until `close`.

        lease: takes a lease that holds off the next save's commit; None: take no lease.
        """
        if self._files is not None:
            if lease is not None:
                lease.enter_context(self._files.leased(rank))
            self._files.keep_files()
        metadata, of_all_ranks = self._read_metadata(rank)
        # torch's ranks each have an id when they save on their own; ours share one.
        comparable = of_all_ranks or knows_saves(self.reader)
        save_id = save_of(metadata.storage_meta) if comparable else None
        return FoundCheckpoint(metadata, of_all_ranks, save_id)

    def _read_metadata(self, rank: int) -> tuple[Metadata, bool]:
        """The metadata of the whole, or this rank's own, and whether it is the whole's."""
        try:
            return self.reader.read_metadata(), True
        except Exception as whole:
            # A user's storage may report missing metadata with any error; ours raises this one.
            is_missing = self._files is None or isinstance(whole, FileNotFoundError)
            if not is_missing or not accepts_parameter(self.reader.read_metadata, "rank", "kwargs"):
                raise
            try:
                return self.reader.read_metadata(rank=rank), False
            except FileNotFoundError as own:
                raise CheckpointError(self._describe_missing(rank, whole, own)) from whole

    def _describe_missing(self, rank: int, whole: Exception, own: Exception) -> str:
        where = self.where
        if isinstance(where, os.PathLike) and not os.path.exists(where):
            return f"no checkpoint in {where}: the folder does not exist"
        return (
            f"no checkpoint in {self.where}: it has neither metadata for all ranks ({whole}) nor "
            f"for rank {rank} alone ({own})"
        )

    def set_up(self, found: FoundCheckpoint, team: Team) -> None:
        """Hand the reader the metadata that plans will be made from."""
        if accepts_parameter(self.reader.set_up_storage_reader, "kwargs"):
            self.reader.set_up_storage_reader(
                found.metadata,
                team.is_coordinator,
                rank=team.rank,
                use_collectives=found.of_all_ranks,
            )
        else:
            self.reader.set_up_storage_reader(found.metadata, team.is_coordinator)

    def prepare_local_plan(self, local_plan: LoadPlan) -> tuple[LoadPlan, bool]:
        """The rank's plan as the reader wants it, and whether every file that it needs is open.

        If all are, the plan can be carried out despite other saves.
        """
        prepared = self.reader.prepare_local_plan(local_plan)
        plan = require_complete(local_plan, prepared, LoadPlan, "the storage's prepare_local_plan")
        return plan, self._files is not None and self._files.open_files(plan)

    def found_in(self, save_id: str | None) -> Found:
        """This rank's results, to be compared with the others'."""
        return save_id, None if self.place is None else os.fspath(self.place)

    def may_misfit(self, plan: LoadPlan, *, takes_others: bool) -> bool:
        """Whether the plan reads data that can only be checked against the target after reading.

        takes_others: whether the planner takes numbers out of tensors, or fills wrappers of other
            tensors.
        """
        if not prepares_data(self.reader) or not self.reader.prepares():
            return False
        # Only the files show which of torch's entries are wrappers of other tensors.
        unknown = not knows_saves(self.reader) or may_hold_wrappers(self.reader)
        return unknown or takes_others or has_values(plan.items)

    def wish(self, read: Read, ranks: int) -> SharingWish:
        """This rank's say in whether the ranks of a load share reads."""
        return wish_of(read, self.reader, ranks)

    def list_unlocated(self, plan: LoadPlan) -> Ints:
        """The entries of a plan that must be parsed before their data can be read."""
        return self._sharing_reader().unlocated_entries(plan)

    def locate(self, entries: Ints) -> Any:
        """Where the data of these entries is, to be sent to all ranks."""
        return self._sharing_reader().locate_entries(entries)

    def offer(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        capabilities: LoadPlannerCapabilities,
        located: Sequence[Any],
        *,
        insist: bool,
    ) -> Wants:
        """The ranges of bytes that other ranks may want, too."""
        reader = self._sharing_reader()
        return reader.offer_reads(plan, planner, capabilities, located, insist=insist)

    def share(self, rank: int, share: ReadShare, channel: ByteChannel) -> None:
        """Read the plan that was offered together with other ranks."""
        self._sharing_reader().share_reads(rank, share, channel)

    def _sharing_reader(self) -> SharesReads:
        if not shares_reads(self.reader):
            raise TypeError(f"{type(self.reader).__name__} shares no reads")
        return self.reader

    def prepare(
        self, plan: LoadPlan, planner: LoadPlanner, capabilities: LoadPlannerCapabilities
    ) -> None:
        """Read and judge everything that may not fit its target; `read` goes on from there."""
        if prepares_data(self.reader) and self.reader.prepares():
            self.reader.prepare_data(plan, planner, capabilities)

    def read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Fill the planner's targets."""
        self.reader.read_data(plan, planner).wait()

    def close(self) -> None:
        """Close the files that were kept open."""
        if self._files is not None:
            self._files.close_files()

    def with_byte_counts(self, report: LoadReport) -> LoadReport:
        """The report with the bytes that were read, where the reader counts them."""
        if not verifies_bytes(self.reader):
            return report
        filled = self.reader.filled
        return replace(
            report,
            bytes_needed=filled.bytes_needed,
            bytes_read=filled.bytes_read,
            bytes_verified=filled.bytes_verified,
        )
