"""The ranks' replies about a property's example -> the engine's verdict. Pure (no I/O).

Enters: the outcome of a phase, the replies that came with it, and the records of the draws. Leaves:
whether the example passed, was rejected or failed, by which rank, and for which bug.

A rank that failed by itself takes precedence over a rank that rejected the example, which takes
precedence over ranks that passed or failed only because of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_dcp._harness.lockstep.example_messages import Choice, Entry, Property, Reply, divergence
from pytest_dcp._harness.protocol.function_pickles import load_from_rank
from pytest_dcp._harness.protocol.group_use import out_of_step
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world.outcome import OUT_OF_STEP, Outcome, combine, is_echo
from pytest_dcp.errors import RankFailure, WorldError


@dataclass(frozen=True, slots=True)
class ExampleVerdict:
    """The verdict of all ranks on an example."""

    outcome: Outcome
    """A failure if ranks drew differently or are out of step, even if no rank reported one."""
    replies: Mapping[int, Reply]
    records: Mapping[int, Sequence[Entry]]
    """By rank, its draws; only rank 0's if no rank failed and all drew the same."""
    diverged: bool

    @property
    def is_last(self) -> bool:
        """Whether no further example can be run: after a skip, an exit or a failed health check."""
        goes_on = self.outcome.kind in ("passed", "failed", "xfailed")
        if self.outcome.session_end is not None:
            goes_on = False
        return not goes_on or any(reply.fatal for reply in self.replies.values())

    @property
    def rejected_by(self) -> int | None:
        """The rank that rejected the example; None if none did, or one failed."""
        rejecting = [rank for rank, reply in self.replies.items() if reply.rejects]
        return min(rejecting) if rejecting and self.failure is None else None

    @property
    def failure(self) -> RankFailure | None:
        """The failure that decides: the lowest rank's. The earliest could differ from run to run.

        A rank without a reply does not count as a failure if another rejected the example.
        """
        rejected = not self.diverged and any(reply.rejects for reply in self.replies.values())
        own = [
            failure
            for failure in self.outcome.failures
            if not is_echo(failure) and not (rejected and failure.kind == "diverged")
        ]
        return min(own, key=lambda failure: failure.rank, default=None)

    @property
    def decisive(self) -> int:
        """The rank whose record the engine receives."""
        if self.diverged:  # with fewer choices the other ranks would stop early
            return max(self.records, key=lambda rank: _choices(self.records[rank]))
        if self.failure is not None:
            return self.failure.rank
        if self.rejected_by is not None:
            return self.rejected_by
        return min(self.records, default=0)

    @property
    def bug(self) -> str:
        """Identifies the failure: type, file and line, or how the process ended."""
        failure = self.failure
        reply = self.replies.get(self.decisive)
        if failure is not None and failure.kind == "crashed":
            return failure.summary
        if failure is not None and failure.kind != "failed":
            return failure.kind
        return reply.origin if reply is not None else self.outcome.reason

    @property
    def can_continue(self) -> bool:
        """Whether the ranks, all alive, can run another example."""
        if self.outcome.lost or not all(reply.reusable for reply in self.replies.values()):
            return False
        return not _out_of_step(self.replies)


def judge(
    outcome: Outcome, replies: Mapping[int, Reply], records: Mapping[int, Sequence[Entry]]
) -> ExampleVerdict:
    """The verdict on an example."""
    is_complete = len(replies) > 1 and all(reply.status == "valid" for reply in replies.values())
    there = {rank: record for rank, record in records.items() if rank not in outcome.lost}
    passed = is_complete and outcome.kind == "passed"
    text = divergence(there, are_complete=passed)
    if passed and not text and not outcome.lost and (text := _out_of_step(replies)):
        text = f"{text}: {OUT_OF_STEP}"
    if text:
        outcome = diverged_outcome(outcome, text)
    return ExampleVerdict(outcome, replies, records, diverged=bool(text))


def _out_of_step(replies: Mapping[int, Reply]) -> str:
    return out_of_step({rank: reply.groups for rank, reply in replies.items()})


def reply_of(rank: int, result: Done) -> Reply:
    """A rank's reply about an example; a rank that ended the whole test takes precedence."""
    if not result.payload:
        return Reply("interesting", (0, 0), origin=result.text, fatal=True)
    reply: Reply = _load_from(rank, result, Reply)
    return reply


def _load_from(rank: int, result: Done, kind: type[Any]) -> Any:
    what = f"a {kind.__name__.lower()}"
    value = load_from_rank(result.payload, rank, what)
    if not isinstance(value, kind):
        raise WorldError(f"rank {rank} sent a {type(value).__qualname__} where {what} was expected")
    return value


def drew_the_same(outcome: Outcome, replies: Mapping[int, Reply], size: int) -> bool:
    """Whether no rank failed, and all say that they made the same choices.

    A rank may have answered and then died, while its peers went on.
    """
    statuses_and_draws = {(reply.status, reply.drawn) for reply in replies.values()}
    alike = (
        len(replies) == size and len(statuses_and_draws) == 1 and replies[0].status != "interesting"
    )
    return alike and not outcome.failures


def find_property(outcome: Outcome) -> Property | Outcome | None:
    """The property that all ranks wait for, None if no rank does; a failure if they differ."""
    if outcome.kind != "passed" or not any(result.awaits for result in outcome.results.values()):
        return None
    properties = {rank: _property(rank, result) for rank, result in sorted(outcome.results.items())}
    first = next(prop for prop in properties.values() if prop is not None)
    if all(same(prop, first) for prop in properties.values()):
        return first
    names = "; ".join(
        f"rank {rank}: {'ended the test' if prop is None else f'runs {prop.name}'}"
        for rank, prop in properties.items()
    )
    return diverged_outcome(outcome, f"ranks are in different properties ({names})")


def same(one: Property | None, other: Property) -> bool:
    """Whether both are the same property of the same test."""
    return one is not None and (one.name, one.database_key) == (other.name, other.database_key)


def diverged_outcome(outcome: Outcome, text: str) -> Outcome:
    """The outcome for ranks that left lockstep."""
    failure = RankFailure(0, "diverged", "call", 0.0, text)
    return combine(0, outcome.results, [failure], outcome.lost)


def _property(rank: int, result: Done) -> Property | None:
    prop: Property | None = _load_from(rank, result, Property) if result.awaits else None
    return prop


def _choices(record: Sequence[Entry]) -> int:
    return sum(isinstance(entry, Choice) for entry in record)
