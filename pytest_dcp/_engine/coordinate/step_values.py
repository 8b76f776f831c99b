"""Pure (no I/O): the messages between ranks in one step.

Every rank sends a `LocalResult`. When it has all of them, the coordinator combines the values into
`Reduced` and gives each rank its `Result`, or all of them one `StepVerdict`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_dcp._engine.coordinate.failure import Cause, checked_cause
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, Head
from pytest_dcp._engine.coordinate.payload import Payload, Segment
from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.coordinate.wire import pack, unpack


@dataclass(frozen=True, slots=True)
class LocalResult:
    """How one rank's local work ended: with a payload, a failure, or in vain (an echo)."""

    payload: Payload = ()
    cause: Cause | None = None
    echo: bool = False

    def frame(self, head: Head) -> Frame:
        """The frame for the coordinator."""
        if self.cause is None:
            return Frame(FrameKind.VALUE, head, self.payload)
        return Frame(FrameKind.ABORTED if self.echo else FrameKind.FAILED, head, pack(self.cause))

    @classmethod
    def read(cls, frame: Frame) -> LocalResult:
        """The result in a frame. Raises ValueError for any other frame."""
        if frame.kind is FrameKind.VALUE:
            return cls(payload=frame.segments)
        if frame.kind not in (FrameKind.FAILED, FrameKind.ABORTED):
            raise ValueError(f"expected a statement, got a frame of kind {frame.kind.name}")
        return cls(
            cause=checked_cause(unpack(frame.segments)), echo=frame.kind is FrameKind.ABORTED
        )


@dataclass(frozen=True, slots=True)
class Result:
    """The step succeeded on every rank."""

    payload: Payload = ()
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
    """Above 0: from here on every rank numbers its operations from 1 again, in this epoch."""

    def summary(self) -> str:
        """One line: each failed rank, and the first line of its exception."""
        return "; ".join(cause.summary() for cause in self.causes)

    def frame(self, head: Head) -> Frame:
        """The frame for a peer."""
        return Frame(FrameKind.VERDICT, head, pack(self))

    @classmethod
    def read(cls, frame: Frame) -> StepVerdict:
        """The verdict in a frame. Raises ValueError for any other frame."""
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


record(StepVerdict)


@dataclass(frozen=True, slots=True)
class Reduced:
    """The coordinator's answer to a step's values."""

    own: object
    shared: Sequence[Segment] = ()
    """The payload for every rank ..."""
    apart: Sequence[Payload] = field(default=())
    """... or one per rank; the coordinator's is ignored."""

    def payload(self, rank: int) -> Payload:
        """A rank's result."""
        return self.apart[rank] if self.apart else self.shared


Combine = Callable[[Sequence[Payload]], Reduced]
"""From the payloads of all ranks, in rank order; the coordinator's own is empty."""
