"""The arguments of a save as two values: the call's, and the request that one rank carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine.coordinate import OperationCall, Team, team_of
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.staging.unstaged_tensors import UnstagedTensors
from pytest_dcp._engine.verbs.storage_for_id import Id, reset_to, subject_of, writer_for


@dataclass(frozen=True, slots=True)
class SaveCall:
    """Where a save was called to write, and with which ranks: torch's arguments, unchecked."""

    storage_writer: StorageWriter | None
    """None: the storage that `checkpoint_id` chooses."""
    checkpoint_id: Id = None
    process_group: dist.ProcessGroup | None = None
    no_dist: bool = False
    """Whether this rank saves alone."""
    coordinator_rank: int = 0
    """In the group."""
    use_collectives: bool = True
    """False: each rank plans and commits its own part, perhaps in a folder of its own."""
    storage_options: Mapping[str, Any] | None = None
    """For the file system of a URL that `checkpoint_id` gives."""

    def open_team(self, operation: str = "save", *, background: bool = False) -> Team:
        """The team of this save, which takes its place in the order of the group's operations."""
        subject = subject_of(self.storage_writer, self.checkpoint_id)
        return team_of(
            self.process_group,
            OperationCall(operation, subject, self.use_collectives, background),
            use_dist=not self.no_dist,
            coordinator_rank=self.coordinator_rank,
        )

    def writer(self) -> StorageWriter:
        """The storage to write to.

        Raises TypeError or RuntimeError if the id names none, ValueError for options that it does
        not take.
        """
        return writer_for(self.storage_writer, self.checkpoint_id, self.storage_options)

    def reset(self) -> Callable[[], None] | None:
        """A function that sets a given storage to the id, if there is anything to set."""
        return reset_to(self.storage_writer, self.checkpoint_id)


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What to save, and where to: the arguments of one save on this rank."""

    state: Callable[[], dict[str, Any]]
    """Gives the state dict; asked in the first step, so that its failure reaches every rank."""
    writer: StorageWriter
    planner: SavePlanner
    use_collectives: bool = True
    """False: each rank plans and commits its own part."""
    progress: Callable[[Progress], None] | None = None
    """Called now and then with this rank's progress."""
    unstaged: UnstagedTensors | None = None
    """Tensors of the state whose memory the caller waits to have back."""
    reset: Callable[[], object] | None = None
    """Makes the writer ready; called in the first step, since an earlier save of the group may
    still use the same writer."""
