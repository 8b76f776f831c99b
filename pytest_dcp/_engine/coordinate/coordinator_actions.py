"""What the coordinator of an operation can decide to do.

Values: `coordinator_state` makes them, `CoordinatorSide` carries them out in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_dcp._engine.coordinate.payload import Payload
from pytest_dcp._engine.coordinate.step_values import Result, StepVerdict


@dataclass(frozen=True, slots=True)
class SendAlert:
    """Tell peers that a rank failed."""

    ranks: Sequence[int]
    text: str


@dataclass(frozen=True, slots=True)
class SendResult:
    """Give peers the result of the step, the same to all of them."""

    ranks: Sequence[int]
    payload: Payload


@dataclass(frozen=True, slots=True)
class SendVerdict:
    """Give peers the verdict on the step."""

    ranks: Sequence[int]
    verdict: StepVerdict


@dataclass(frozen=True, slots=True)
class SendPing:
    """Tell a peer that this rank is alive."""

    rank: int


@dataclass(frozen=True, slots=True)
class ReadOn:
    """Read the rest of a peer's messages: it may leave for good after a failure."""

    rank: int


@dataclass(frozen=True, slots=True)
class PublishVerdict:
    """Put a final verdict in the store, for peers that have not joined."""

    verdict: StepVerdict


@dataclass(frozen=True, slots=True)
class CombineValues:
    """Combine the payloads of all ranks, in rank order; the coordinator's own is empty."""

    payloads: Sequence[Payload]


@dataclass(frozen=True, slots=True)
class Conclude:
    """Wait at most `patience_s` for peers to take the answer, and end the step with an outcome."""

    outcome: Result | StepVerdict
    patience_s: float


SendAction = SendAlert | SendResult | SendVerdict | SendPing
CoordinatorAction = SendAction | ReadOn | PublishVerdict | CombineValues | Conclude
