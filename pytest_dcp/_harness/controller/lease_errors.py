"""A world's request for resources of the machine, and the errors if it is not granted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_dcp.errors import DcpError


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Resources that one world needs for its life."""

    processes: int
    """Rank processes, >= 1. A world of more than the whole budget takes the whole budget."""
    gpus: int
    """Exclusive GPUs, >= 0."""

    def __post_init__(self) -> None:
        if self.processes < 1 or self.gpus < 0:
            raise ValueError(f"expected processes >= 1 and gpus >= 0, got {self!r}")


@dataclass(frozen=True, slots=True)
class Shortage:
    """The facts of a lease that did not come in time."""

    request: LeaseRequest
    waiting_for: str
    """CPU slots, GPUs, or the turn to collect either."""
    max_processes: int
    """CPU slots in the budget."""
    free_processes: int
    """CPU slots that were free when the wait ended."""
    visible_gpus: tuple[str, ...]
    """Keys of the GPUs that this process may use."""
    free_gpus: int
    """GPUs among them that were free when the wait ended."""
    waited_s: float
    folder: Path
    """Where the lock files are."""


class LeaseError(DcpError):
    """The base of what goes wrong with leases."""


class LeaseTimeout(LeaseError):
    """Too little was free for too long."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage)
        self.shortage = shortage

    def __str__(self) -> str:
        facts = self.shortage
        processes = min(facts.request.processes, facts.max_processes)
        return (
            f"no lease for a world of {facts.request.processes} processes after "
            f"{facts.waited_s:.1f} s: it was waiting for {facts.waiting_for}. "
            f"Wanted: {processes} of the {facts.max_processes} CPU slots, {facts.request.gpus} of "
            f"the {len(facts.visible_gpus)} GPUs {facts.visible_gpus!r}. "
            f"Free: {facts.free_processes} CPU slots, {facts.free_gpus} GPUs. "
            f"Other pytest processes hold the rest through locks in {str(facts.folder)!r}; "
            "`lslocks` lists them. Let them end, run fewer at once (pytest -n), or, if CPU slots "
            "are short, allow more with --dcp-max-procs"
        )


class GpusUnavailable(LeaseError):
    """A world needs more GPUs than this process may ever use."""

    def __init__(self, count: int, visible: tuple[str, ...]) -> None:
        super().__init__(count, visible)
        self.count = count
        self.visible = visible

    def __str__(self) -> str:
        return (
            f"expected {self.count} GPUs or more, got {len(self.visible)} visible to this "
            f"process: {self.visible!r}. Widen CUDA_VISIBLE_DEVICES, use a machine with more, or "
            "give the world fewer ranks"
        )


class LeaseFolderRejected(LeaseError):
    """The folder of the lock files is not safely ours."""

    def __init__(self, folder: Path, problems: tuple[str, ...]) -> None:
        super().__init__(folder, problems)
        self.folder = folder
        self.problems = problems

    def __str__(self) -> str:
        return (
            f"the folder of lease locks {str(self.folder)!r} {' and '.join(self.problems)}. "
            "Remove it, or set TMPDIR to a folder of your own"
        )
