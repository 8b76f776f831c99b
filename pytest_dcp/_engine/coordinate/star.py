"""Values of the star: the coordinator in the middle, every other rank on a line to it.

A step is one exchange. Every rank states how its local work ended; when all have, the coordinator
combines the values and answers each rank with its result, or all with one verdict. `Hub` is the
coordinator's side of it, `Spoke` that of every other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from pytest_dcp._engine.coordinate import wire
from pytest_dcp._engine.coordinate.failure import (
    Cause,
    OutOfStepError,
    RankEndedError,
    RankLeftError,
    RankSilentError,
    capture,
    checked_cause,
)
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, Head
from pytest_dcp._engine.coordinate.parcel import Parcel, Segment, pack, unpack
from pytest_dcp._engine.coordinate.sequence import OperationPlace

PINGS_PER_TIMEOUT = 4
PARTING_S = 1.0
"""How long a rank that leaves waits for its peers to take the reason."""


@dataclass(frozen=True, slots=True)
class Site:
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
    """Where in the order of the group's operations it was called."""
    one_subject: bool = False
    """Whether all ranks must mean the same folder."""

    @property
    def margin_s(self) -> float:
        """By how much a peer outwaits the coordinator, whose verdict says more."""
        return min(5.0, 0.5 + 0.1 * self.timeout_s)

    @property
    def ping_s(self) -> float:
        """How often a waiting coordinator says that it is alive, and busy ranks do."""
        return min(10.0, self.timeout_s / PINGS_PER_TIMEOUT)

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
        """The cause that a rank was not heard of."""
        text = f"{self.name_of(rank)} was silent for {self.timeout_s:g} s {self._in(step)}"
        return capture(rank, RankSilentError(f"{text}: it hangs, or has not come to this step"))

    def unreached(self, rank: int, step: str, error: OSError) -> Cause:
        """The cause that no network leads to a rank, which says nothing of its process."""
        text = f"{self.name_of(rank)} cannot be reached from rank {self.rank} {self._in(step)}"
        return capture(rank, RankSilentError(f"{text}: {error}"))

    def out_of_step(self, rank: int, text: str) -> Cause:
        """The cause that a rank does something else than the coordinator."""
        return capture(rank, OutOfStepError(f"{self.name_of(rank)} {text}"))


@dataclass(frozen=True, slots=True)
class Statement:
    """How one rank's local work ended: a parcel, a failure, or in vain (an echo)."""

    parcel: Parcel = ()
    cause: Cause | None = None
    echo: bool = False

    def frame(self, head: Head) -> Frame:
        """The frame that tells the coordinator."""
        if self.cause is None:
            return Frame(FrameKind.VALUE, head, self.parcel)
        return Frame(FrameKind.ABORTED if self.echo else FrameKind.FAILED, head, pack(self.cause))

    @classmethod
    def read(cls, frame: Frame) -> Statement:
        """The statement of such a frame. Raises ValueError for a frame that is none."""
        if frame.kind is FrameKind.VALUE:
            return cls(parcel=frame.segments)
        if frame.kind not in (FrameKind.FAILED, FrameKind.ABORTED):
            raise ValueError(f"expected a statement, got a frame of kind {frame.kind.name}")
        return cls(
            cause=checked_cause(unpack(frame.segments)), echo=frame.kind is FrameKind.ABORTED
        )


@dataclass(frozen=True, slots=True)
class Result:
    """The step succeeded on every rank."""

    parcel: Parcel = ()
    """For this rank; empty on the coordinator."""
    value: object = None
    """On the coordinator."""


@dataclass(frozen=True, slots=True)
class StepVerdict:
    """The step failed, with the causes of all ranks that failed."""

    step: str
    causes: Sequence[Cause]
    final: bool
    """Whether ranks are missing or out of step, so that no further step can be run."""
    epoch: int = 0
    """Above 0: every rank counts its operations anew from here on, in this epoch."""

    def frame(self, head: Head) -> Frame:
        """The frame that tells a peer."""
        return Frame(FrameKind.VERDICT, head, pack(self))

    @classmethod
    def read(cls, frame: Frame) -> StepVerdict:
        """The verdict of such a frame. Raises ValueError for a frame that is none."""
        found: Any = unpack(frame.segments) if frame.kind is FrameKind.VERDICT else frame.kind.name
        whole = (
            isinstance(found, StepVerdict)
            and type(found.step) is str
            and type(found.final) is bool
            and type(found.epoch) is int
            and isinstance(found.causes, list | tuple)
        )
        if not whole:
            raise ValueError(f"expected the verdict on a step, got {found!r:.200}")
        for cause in found.causes:
            checked_cause(cause)
        verdict: StepVerdict = found
        return verdict


wire.record(StepVerdict)


@dataclass(frozen=True, slots=True)
class Replies:
    """What the coordinator answers to a step's values."""

    own: object
    shared: Sequence[Segment] = ()
    """The parcel for every rank ..."""
    apart: Sequence[Parcel] = field(default=())
    """... or one per rank, the coordinator's left out of account."""

    def parcel(self, rank: int) -> Parcel:
        """What a rank gets."""
        return self.apart[rank] if self.apart else self.shared


Combine = Callable[[Sequence[Parcel]], Replies]
"""From the parcels of all ranks, in rank order; the coordinator's own is empty."""


class Star(Protocol):
    """One rank's side of an operation."""

    def join(self, head: Head) -> StepVerdict | None:
        """Get in touch with the other side; a verdict when that is not to be had."""

    def exchange(self, head: Head, own: Statement, combine: Combine) -> Result | StepVerdict:
        """State how this rank's work ended, and wait for what becomes of the step."""

    def trouble(self) -> str | None:
        """The first failure that a peer has told of, in one line; never waits."""

    def leave(self, head: Head, cause: Cause) -> None:
        """Tell the others why this rank leaves, within `PARTING_S`, and close."""

    def close(self) -> None:
        """Leave with nothing to say. A second call does nothing."""
