"""A rank's life as a table of states, and the actions that can be taken on it. Pure (no I/O).

Only values: the states, the message that leads from one to the next, and the actions that the
supervisor decides and the world carries out.
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass

from pytest_dcp._harness.protocol.messages import (
    At,
    DebugAsk,
    DebugDone,
    Done,
    Down,
    Exchange,
    FaultAsk,
    Go,
    Leave,
    Met,
    Phase,
)


class RankState(enum.Enum):
    """Where a rank is in its life."""

    IDLE = "idle"
    """Waits for the next order."""
    RUNNING = "running"
    MEETING = "meeting"
    """Inside a phase, waits for its peers at an exchange."""
    DEBUGGING = "debugging"
    """Inside a phase, has the terminal."""
    DEBUGGING_MEETING = "debugging at an exchange"
    """Has the terminal and waits for its peers: its user stepped over `world.barrier()`."""
    LEAVING = "leaving"
    """Was ordered to end. It sends `Done("finish")` when its exit has run, and then it ends."""
    KILLED = "killed"
    """Was sent SIGKILL, and is not reaped yet."""
    GONE = "gone"

    # By identity, in C; that of `Enum` is a function in Python, called 160 times for each test.
    __hash__ = object.__hash__


S = RankState
TRANSITIONS: dict[tuple[RankState, type[object]], RankState] = {
    (S.IDLE, Go): S.RUNNING,
    (S.IDLE, Leave): S.LEAVING,
    (S.RUNNING, Done): S.IDLE,
    (S.RUNNING, Exchange): S.MEETING,
    (S.MEETING, Met): S.RUNNING,
    (S.MEETING, Done): S.IDLE,  # this and the next: only if the rank was interrupted
    (S.MEETING, At): S.MEETING,
    (S.RUNNING, DebugAsk): S.DEBUGGING,
    (S.DEBUGGING, DebugDone): S.RUNNING,
    (S.DEBUGGING, Exchange): S.DEBUGGING_MEETING,
    (S.DEBUGGING_MEETING, Met): S.DEBUGGING,
    (S.RUNNING, At): S.RUNNING,
    (S.DEBUGGING, At): S.DEBUGGING,
    (S.RUNNING, FaultAsk): S.RUNNING,
    (S.DEBUGGING, FaultAsk): S.DEBUGGING,
    (S.LEAVING, Done): S.LEAVING,
}
HAS_TERMINAL = frozenset({S.DEBUGGING, S.DEBUGGING_MEETING})
BUSY = frozenset({S.RUNNING, S.MEETING, S.LEAVING}) | HAS_TERMINAL


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the rank."""

    rank: int
    message: Down


@dataclass(frozen=True, slots=True)
class Dump:
    """Have the rank write the stacks of all its threads."""

    rank: int


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Raise KeyboardInterrupt in the rank."""

    rank: int


@dataclass(frozen=True, slots=True)
class KillRank:
    """SIGKILL the rank and the processes that it started."""

    rank: int


@dataclass(frozen=True, slots=True)
class StopRank:
    """SIGSTOP the rank and the processes that it started."""

    rank: int


@dataclass(frozen=True, slots=True)
class Continue:
    """SIGCONT the rank and the processes that it started."""

    rank: int


Action = Send | Dump | Interrupt | KillRank | StopRank | Continue


def exit_text(status: int) -> str:
    """How a process ended, in words; a negative `status` is a signal's number."""
    if status >= 0:
        return f"exited with code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown signal"
    return f"was killed by signal {-status} ({name})"


def when_text(state: RankState, status: int, phase: Phase) -> str:
    """When a rank ended unexpectedly, in words."""
    if state is RankState.LEAVING:
        return " before its exit had finished" if status == 0 else " after its verdict"
    if state is RankState.IDLE:
        return f" after {phase}"
    return f" in {phase}, without a verdict" if state in BUSY else ", without a verdict"
