"""The package's exceptions: standard library only, and every one survives pickling.

They are raised in ranks and in the controller and cross between them, so each keeps its facts as
plain attributes and rebuilds from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal[
    "failed", "crashed", "closed", "flooded", "timeout", "blocked", "diverged", "lost"
]


class DcpError(Exception):
    """The base of every exception of this package."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What went wrong in one rank.

    `failed`: an exception; `crashed`: the process ended without its verdict; `closed`: it closed
    its report socket; `flooded`: it printed more than the limit; `timeout`: it was running at the
    time limit; `blocked`: it was still running when the grace after a peer's failure ended;
    `diverged`: it skipped or passed where its peers did not; `lost`: it could not be killed.
    """

    rank: int
    kind: FailureKind
    phase: str
    """boot, setup, call, teardown or finish."""
    at_s: float
    """CLOCK_MONOTONIC seconds, comparable between the processes of one machine."""
    summary: str
    """One line: the exception's type and text, or how the process ended."""
    detail: str = ""
    """Several lines: the traceback, or the stacks of all threads."""


class WorldError(DcpError):
    """A world failed: carries what went wrong in every rank, the first cause first."""

    def __init__(self, message: str, failures: tuple[RankFailure, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.failures = failures

    def __reduce__(self) -> tuple[Callable[..., WorldError], tuple[object, ...], dict[str, object]]:
        return type(self), (self.message, self.failures), dict(self.__dict__)


class DivergedError(DcpError):
    """Ranks left lockstep: they asked for different things, or a peer had already left."""
