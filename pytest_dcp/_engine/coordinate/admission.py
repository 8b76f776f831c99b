"""Pure (no I/O): whether a peer that arrives belongs to the operation that the coordinator runs."""

from __future__ import annotations

from enum import Enum, auto

from pytest_dcp._engine.coordinate.hello import Hello
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import (
    CallOrder,
    OperationPlace,
    Subject,
    kind_of,
)

RACE_S = 0.5
"""How long two kinds of operation with the same number may be a race between two threads of the
user: on every rank both threads call at about the same time."""


class Admission(Enum):
    """The decision about a peer."""

    JOIN = auto()
    """It runs this operation."""
    LATER = auto()
    """It runs another operation, which this rank has called too, or will call."""
    STALE = auto()
    """It runs an operation that is over, and has left."""
    ASTRAY = auto()
    """It runs another operation instead of this one."""
    OUT_OF_COUNT = auto()
    """As ASTRAY, and the numbers of the two ranks do not match."""


def admit(
    hello: Hello, mine: OperationPlace, order: CallOrder, *, has_left: bool, waited_s: float
) -> Admission:
    """What to do with a peer that says hello.

    mine: the coordinator's operation. has_left: the peer has left already. waited_s: since it
    arrived.
    """
    kind = kind_of(hello.operation)
    # Numbers of different epochs cannot be compared: the ranks must begin a new one together.
    if hello.epoch != mine.epoch:
        return Admission.STALE if has_left else Admission.OUT_OF_COUNT
    if hello.number == mine.number and kind == mine.kind:
        return Admission.JOIN
    # This rank has called it too: it runs in another thread, or comes after this one.
    if order.is_pending(kind, hello.epoch, hello.number):
        return Admission.LATER
    if has_left and hello.number < mine.number:
        return Admission.STALE
    # Threads raced for their numbers, so the numbers mean nothing: compare the kinds.
    if kind == mine.kind and (hello.unordered or mine.unordered):
        return Admission.JOIN
    # This rank's other thread may be about to call it.
    if hello.number == mine.number:
        return Admission.LATER if waited_s < RACE_S else Admission.ASTRAY
    # The peer is ahead. If it has finished this number, it ran something else under it.
    if hello.number > mine.number:
        missed = hello.finished_up_to >= mine.number
        return Admission.OUT_OF_COUNT if missed else Admission.LATER
    return Admission.OUT_OF_COUNT


def difference(hello: Hello, context: OperationContext, verdict: Admission) -> str | None:
    """Why a peer cannot take part in the coordinator's operation; None: it can."""
    mine = context.place.subject
    theirs = None if hello.subject is None else Subject(*hello.subject)
    if hello.operation.removeprefix("async_") != context.operation.removeprefix("async_"):
        what, ours = _describe(hello.operation, theirs), _describe(context.operation, mine)
        return f"runs {what} where the coordinator runs {ours}"
    if verdict is Admission.OUT_OF_COUNT:
        return (
            f"is in operation {hello.number} of this group where the coordinator is in "
            f"{context.place.number}: one of them has missed one; run it again"
        )
    if not context.one_subject or theirs is None or mine is None or theirs.is_same(mine):
        return None
    return (
        f"runs {context.operation!r} with {theirs.name!r} where the coordinator runs it with "
        f"{mine.name!r}: every rank must give the same checkpoint_id, and call the group's "
        "saves and loads in the same order"
    )


def _describe(operation: str, subject: Subject | None) -> str:
    return f"{operation!r}" if subject is None else f"{operation!r} of {subject.name!r}"
