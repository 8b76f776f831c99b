"""The messages that a rank may send at each point of its life. Pure (no I/O).

Enters: a message that decoded well, and where its rank is. Leaves: in words, why the message does
not fit the rank's state, or nothing. A test can reach its own rank's socket, and write to it by
hand: such a message must not pass for the answer to an order.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_dcp._harness.protocol.messages import At, Done, FaultAsk, Phase, Up
from pytest_dcp._harness.world.rank_states import TRANSITIONS, RankState

PREPARED = frozenset({"boot", "setup"})
"""The phases that ranks prepare: a spawned one imports torch, then collects the test."""


@dataclass(frozen=True, slots=True)
class RankTurn:
    """Where a rank is when its message comes."""

    state: RankState
    phase: Phase
    has_answered: bool
    """Whether it has sent this phase's `Done`."""
    is_cut_off: bool
    """Whether an interrupt ends the phase."""


def refusal(message: Up, turn: RankTurn, size: int) -> str:
    """Why a rank of a world of `size` cannot send this now; empty when it can."""
    state, phase = turn.state, turn.phase
    at_exchange = state is RankState.MEETING
    in_turn = not at_exchange or _is_allowed_at_exchange(message, turn.is_cut_off)
    if (state, type(message)) not in TRANSITIONS or not in_turn:
        return _out_of_turn(message, state.value)
    match message:
        case Done() if message.phase != phase:
            return f"ended {message.phase} while in {phase}: was the message written by hand?"
        case Done() if state is RankState.LEAVING and turn.has_answered:
            return _out_of_turn(message, state.value)
        case At(place="preparing" | "ready") if phase not in PREPARED:
            return _out_of_turn(message, f"in {phase}")
        case FaultAsk() if not 0 <= message.rank < size:
            return f"asked to {message.act} rank {message.rank} of a world of {size}"
    return ""


def _is_allowed_at_exchange(message: Up, is_cut_off: bool) -> bool:
    """Of what a rank may say there at all: an interrupt reaches it while it waits."""
    match message:
        case At():
            return message.place == "interrupted"
        case Done():
            return message.outcome == "interrupt" or is_cut_off
    return True


def _out_of_turn(message: Up, where: str) -> str:
    return f"sent {type(message).__name__} while {where}: another thread used its socket?"
