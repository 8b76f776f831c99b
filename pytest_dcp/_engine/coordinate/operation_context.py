"""One rank's place in one operation, and the causes that it reports for its peers' failures."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from pytest_dcp._engine.coordinate.failure import (
    Cause,
    OutOfStepError,
    RankEndedError,
    RankLeftError,
    RankSilentError,
    capture,
)
from pytest_dcp._engine.coordinate.liveness import SignsOfLife
from pytest_dcp._engine.coordinate.operation_order import OperationPlace


@dataclass(frozen=True, slots=True)
class OperationContext:
    """One rank's place in one operation."""

    rank: int
    """In the group."""
    size: int
    coordinator: int
    operation: str
    timeout_s: float
    """Silence of a rank for longer than this is a failure."""
    group: dist.ProcessGroup | None
    """None: this rank is alone."""
    place: OperationPlace
    """Its place in the order of the group's operations."""
    one_subject: bool = False
    """Whether all ranks must use the same folder."""

    @property
    def signs(self) -> SignsOfLife:
        """When ranks of this operation must show that they are alive."""
        return SignsOfLife(self.timeout_s)

    def name_of(self, rank: int) -> str:
        """`rank 2`, and whether it is the coordinator."""
        return f"rank {rank} (the coordinator)" if rank == self.coordinator else f"rank {rank}"

    def _in(self, step: str) -> str:
        return f"in step {step!r} of {self.operation}"

    def ended(self, rank: int, step: str, how: str) -> Cause:
        """The cause that a rank's process is gone."""
        return capture(rank, RankEndedError(f"{self.name_of(rank)} ended {self._in(step)}: {how}"))

    def left(self, rank: int, step: str) -> Cause:
        """The cause that a rank gave the operation up."""
        return capture(
            rank, RankLeftError(f"{self.name_of(rank)} left {self.operation} before step {step!r}")
        )

    def silent(self, rank: int, step: str) -> Cause:
        """The cause for a rank without a sign of life."""
        text = f"{self.name_of(rank)} was silent for {self.timeout_s:g} s {self._in(step)}"
        return capture(rank, RankSilentError(f"{text}: it hangs, or has not come to this step"))

    def unreached(self, rank: int, step: str, error: OSError) -> Cause:
        """The cause that no network leads to a rank, which says nothing about its process."""
        text = f"{self.name_of(rank)} cannot be reached from rank {self.rank} {self._in(step)}"
        return capture(rank, RankSilentError(f"{text}: {error}"))

    def out_of_step(self, rank: int, text: str) -> Cause:
        """The cause that a rank does something else than the coordinator."""
        return capture(rank, OutOfStepError(f"{self.name_of(rank)} {text}"))
