"""Runs Hypothesis' engine in the controller, and its examples in all ranks of a world in lockstep.

Enters: a world whose ranks wait for the examples of a property. Leaves: the outcome of the call:
the ranks' own when all examples passed, else that of the minimal failing example.

Hypothesis generates, shrinks and replays examples by looking at the choices that a test draws. With
n ranks there are n tests that draw, and n engines would generate n different examples. So there is
one engine, here, and the ranks are its test function:

1. Each rank runs the test until Hypothesis' engine would start. There it answers its `Go` with a
   `Done` that has a `Property` (name, settings, database key), and waits.
2. All ranks must wait for the same property (`find_property`). The engine is started here, with a
   stand-in for the test function.
3. For each example that the engine wants, the stand-in sends every rank the same `Attempt`: the
   choices to replay, and a seed for later choices. Each rank draws from it independently, runs its
   test function, and answers with a `Reply`. It records its draws in a file in memory, which the
   controller can read even if the rank dies during the example.
4. `judge` makes one verdict of the replies and records. The engine gets the record of the decisive
   rank, as if the stand-in had drawn it, and then the result: passed, rejected or failed.
5. When the engine needs no more examples, a `Go` lets the ranks continue: to the next property of
   the test, which begins at 2 again, or to the test's end.

The decisive rank is the same each time that an example is run (the lowest that failed by itself, or
else the lowest that rejected it, or else the lowest): a shrinking engine that saw rank 1's choices
once and rank 0's another time would call the test flaky. If the ranks drew differently, that is the
failure, and the rank with the longest record is decisive.

How an example can end:

- All ranks answered and are in step: the world runs the next example, whether this one failed or
  not. So an example costs one message to each rank, not a process.
- A rank died, hangs, or its process groups are out of step: the world is not used again. The next
  example begins with `repair`: a new world, in which the ranks run the test again up to the same
  property, skipping the properties before it. If they do not reach it, the property is over.
- A rank fails while others wait for it in a collective: the verdict is certain, and waiting could
  only save the world. `EarlyDecision` ends the wait early; in the last run, which is reported, the
  peers get their full time.
- A rank skips the test, exits, or fails a health check: no example follows (`_EndedError`).
- Ranks die between two examples: that is not a failure of any example, and ends the property.

Assumes that a test draws the same from the same attempt in every rank: this is what lockstep means,
and a difference is reported as a failure. Guarantees that the engine sees a deterministic test
function if the ranks are deterministic.

Rules that hold inside:

- An example fails when any rank does: by an exception, its death, or the time limit, which starts
  again for each example. If one rank's `assume` rejects the example, it is rejected for all.
- The engine learns an example's draws from the record of the decisive rank only, so they are the
  same each time that the example is run.
- An example also fails when the ranks' process groups are out of step after it.
- After a failure, the world is kept only when every rank answered and they are in step; otherwise
  the next example gets a new one.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from pytest_dcp._harness.lockstep.example_messages import (
    Attempt,
    Property,
    decode,
    divergence,
    merged_lines,
)
from pytest_dcp._harness.lockstep.verdict import (
    ExampleVerdict,
    diverged_outcome,
    drew_the_same,
    find_property,
    judge,
    reply_of,
    same,
)
from pytest_dcp._harness.protocol.messages import Done, Example, Go
from pytest_dcp._harness.world.outcome import Outcome, combine, is_echo
from pytest_dcp._harness.world.world import World
from pytest_dcp.errors import RankFailure, WorldError

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup  # Hypothesis needs it there

PATIENCE_S = 0.05
"""Time for the peers of a failed rank to end the example too, so that the world can be kept."""
BUSY_PATIENCE_S = 1.0
"""Time for peers that are still working and may still decide the verdict: the machine may be busy.
A failed rank's peers have the grace at most.
"""
BUSY_SHARE = 4
"""The grace is also at most this fraction of the example's time limit."""
DRAWS_LOOK_S = 0.1
"""How often to compare the draws of ranks that do not end an example."""
LOOK_SHARE = 10
"""Comparing may take at most this fraction of the time."""
HANG_FACTOR = 20
HANG_LEAST_S = 2.0
"""Once an example has hung, later ones get this multiple of the slowest finished example's time,
and at least this long: otherwise each step of shrinking a hang would take the whole time limit. The
last run, which is reported, gets all of it.
"""


class ExampleRanks(Protocol):
    """The item whose ranks run the examples."""

    limit_s: float

    @property
    def world(self) -> World:
        """The world in which the item is running now."""

    def renew(self) -> Outcome:
        """Replace a broken world by a new one, in which the item's call has begun."""

    def fresh(self) -> None:
        """Renew all state that must be new for each example."""

    def exception_for(self, outcome: Outcome) -> BaseException:
        """The exception that represents a failed outcome in the controller."""

    def lead_with_unexpected(self, outcome: Outcome) -> Outcome:
        """The outcome with failures that an xfail marker does not expect on top."""


@dataclass(frozen=True, slots=True)
class Found:
    """A failure that Hypothesis found and has minimised."""

    outcome: Outcome
    notes: tuple[str, ...]
    """The example as code, the notes, and how to reproduce it."""


class FoundError(Exception):
    """A property fails: carries the minimal example of each distinct failure."""

    def __init__(self, found: Sequence[Found], seed: int | str | None) -> None:
        super().__init__(found[0].outcome.reason)
        self.found = tuple(found)
        self.seed = seed
        """The --hypothesis-seed that finds it again; None if Hypothesis gives none."""


class _EndedError(BaseException):
    """No more examples can be run; the engine must not count this one as failed."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


def run_properties(ranks_of_item: ExampleRanks, outcome: Outcome) -> Outcome:
    """Serve the ranks' properties until the call is over; returns its outcome.

    `outcome` is that of the call's beginning. Raises `FoundError` for a property that fails, and
    Hypothesis' own exceptions: for a flaky test or one whose examples are all rejected.
    """
    passed = 0
    while (prop := find_property(outcome)) is not None:
        if isinstance(prop, Outcome):
            return prop
        engine = _Engine(ranks_of_item, prop, passed)
        try:
            engine.run()
        except _EndedError as end:
            return end.outcome
        if engine.broken:  # by the last example: rejected, or a rank was lost on request
            engine.repair()
        passed += 1
        ranks_of_item.world.restart_clock(ranks_of_item.limit_s)
        outcome = ranks_of_item.world.run("call", Go("call"))
    return outcome


class _Engine:
    """One property of a test, from its first example to its last."""

    def __init__(self, ranks_of_item: ExampleRanks, prop: Property, passed: int) -> None:
        # Hypothesis is imported only where a test uses it.
        from pytest_dcp._harness.lockstep import hypothesis_stand_in

        self._hypothesis = hypothesis_stand_in
        self._item_ranks = ranks_of_item
        self._property = prop
        self._passed = passed
        """Number of properties of the same test before this one."""
        self.broken = False
        self._slowest_s = 0.0
        self._hung = False
        self._busy_s = BUSY_PATIENCE_S
        self._kinds: dict[str, type[BaseException]] = {}
        self._found: dict[type[BaseException], Outcome] = {}

    def run(self) -> None:
        """Have Hypothesis test the property. Raises `FoundError` or Hypothesis' own exceptions."""
        __tracebackhide__ = True
        stand_in = self._hypothesis.stand_in(self._property, self._run_example)
        found: list[Found] = []
        try:
            with self._hypothesis.seeding_nothing():
                stand_in()
        except Exception as error:  # noqa: BLE001 - Hypothesis raises the exceptions made of the ranks' errors
            found = self._minimal(error)
            # Not about the ranks' errors: a flaky test, or one of Hypothesis' own checks.
            if not found:
                raise self._hypothesis.hide_stand_in(error) from None
        if found:
            raise FoundError(found, self._hypothesis.seed_of(stand_in))

    def _minimal(self, error: Exception) -> list[Found]:
        """The failures in Hypothesis' exception; empty if it is about something else."""
        # Several bugs come as one plain group. A group that the test itself raised is of a
        # subclass, see `_subclass`.
        errors = [error]
        if isinstance(error, ExceptionGroup) and type(error) is ExceptionGroup:
            errors = list(error.exceptions)
        if any(type(one) not in self._found for one in errors):
            return []
        return [Found(self._found[type(one)], self._notes(one)) for one in errors]

    def _notes(self, error: Exception) -> tuple[str, ...]:
        return tuple(getattr(self._hypothesis.hide_stand_in(error), "__notes__", ()))

    # One example.

    def _run_example(self, data: Any, final: bool) -> None:
        """Have the ranks run the engine's next example, and report the result to the engine."""
        world_s = self._make_ready()
        verdict = self._attempt(self._hypothesis.attempt_of(data, final=final))
        self.broken = not (self._item_ranks.world.survivors_idle and verdict.can_continue)
        if verdict.is_last:
            raise _EndedError(verdict.outcome)
        self._report_draws(data, verdict)
        if world_s:
            # As drawing: the boot of a world is not the example's own time.
            data.draw_times["generate:a new world"] = world_s
        if (rank := verdict.rejected_by) is not None:
            self._hypothesis.reject(data, verdict.replies[rank])
        for line in merged_lines(verdict.records, verdict.decisive):
            self._hypothesis.say(line)
        if verdict.outcome.kind != "passed":
            self._fail(verdict)

    def _make_ready(self) -> float:
        """Provide a world that can run an example. Returns the seconds that it took."""
        world = self._item_ranks.world
        if not self.broken and (died := world.find_deaths()):
            # Not a failure of the example: Hypothesis would shrink an example that has done
            # nothing.
            raise _EndedError(combine(0, {}, died))
        if self.broken or not world.survivors_idle:
            return self.repair()
        return 0.0

    def _attempt(self, attempt: Attempt) -> ExampleVerdict:
        world = self._item_ranks.world
        world.forget_draws()
        self._item_ranks.fresh()
        limit_s = self._limit_s(attempt)
        world.restart_clock(limit_s)
        order = Example(pickle.dumps(attempt))
        started = time.monotonic()
        early = EarlyDecision(world, attempt.final, min(self._busy_s, limit_s / BUSY_SHARE))
        outcome = world.run_until("call", order, early.is_decided)
        if early.in_vain:  # they poll: do not compare again in this property
            self._busy_s = PATIENCE_S
        if any(failure.kind == "timeout" for failure in outcome.failures):
            self._hung = True
        elif len(outcome.results) == world.spec.size:
            self._slowest_s = max(self._slowest_s, time.monotonic() - started)
        replies = {rank: reply_of(rank, result) for rank, result in outcome.results.items()}
        size = world.spec.size
        # Equal records need to be decoded once only.
        ranks = (0,) if drew_the_same(outcome, replies, size) else range(size)
        return judge(outcome, replies, {rank: decode(world.draws(rank)) for rank in ranks})

    def _limit_s(self, attempt: Attempt) -> float:
        if attempt.final or not self._hung:
            return self._item_ranks.limit_s
        return min(self._item_ranks.limit_s, max(HANG_LEAST_S, HANG_FACTOR * self._slowest_s))

    def repair(self) -> float:
        """Begin the call again in a new world. Returns the seconds that it took."""
        started = time.perf_counter()
        outcome = self._item_ranks.renew()
        # The call begins anew, so the properties that passed before come first: pass over them.
        for _ in range(self._passed):
            if find_property(outcome) is None:
                break
            outcome = self._item_ranks.world.run("call", Go("call"))
        prop = find_property(outcome)
        if not isinstance(prop, Property) or not same(prop, self._property):
            if outcome.kind == "passed":
                text = f"run anew, the test did not come to {self._property.name} again"
                outcome = diverged_outcome(outcome, text)
            raise _EndedError(prop if isinstance(prop, Outcome) else outcome)
        self.broken = False
        return time.perf_counter() - started

    # Results for the engine.

    def _report_draws(self, data: Any, verdict: ExampleVerdict) -> None:
        """Report the draws to the engine, and the test's observations from any rank."""
        rank = verdict.decisive
        self._hypothesis.mirror(data, verdict.records.get(rank, ()))
        if (reply := verdict.replies.get(rank)) is not None:
            data.misaligned_at = reply.misaligned_at
            data.draw_times.update(reply.draw_times)
        targets = data.target_observations
        for _, reply in sorted(verdict.replies.items(), reverse=True):
            data.events.update(reply.events)
            for label, value in reply.targets.items():
                targets[label] = max(value, targets.get(label, value))

    def _fail(self, verdict: ExampleVerdict) -> NoReturn:
        """Raise an exception of a type that identifies this bug."""
        __tracebackhide__ = True
        outcome = self._item_ranks.lead_with_unexpected(verdict.outcome)
        error = self._item_ranks.exception_for(outcome)
        # Hypothesis tells bugs apart by type: one class for each lets it shrink them separately.
        kind = self._kinds.get(verdict.bug)
        if kind is None:
            kind = self._kinds[verdict.bug] = _subclass(type(error))
        self._found[kind] = outcome
        raise _recast_error(kind, error)


class EarlyDecision:
    """Notices when an example is decided although some ranks have not ended it."""

    def __init__(self, world: World, final: bool, busy_s: float) -> None:
        self.in_vain = False
        """Whether peers kept working for the whole time that they were given."""
        self._world = world
        self._final = final
        self._busy_s = busy_s
        self._decided_at = self._at_rest_since = float("inf")
        self._look_at = time.monotonic() + DRAWS_LOOK_S

    def is_decided(self, results: Mapping[int, Done], failures: Sequence[RankFailure]) -> bool:
        """For `World.run_until`."""
        now = time.monotonic()
        # The last run of a failure is reported, including the peers' ends.
        if not self._final and any(not is_echo(failure) for failure in failures):
            self._decided_at = min(self._decided_at, now)
        if now >= self._look_at:
            if (
                any(reply_of(rank, result).rejects for rank, result in results.items())
                or self._is_diverged()
            ):
                self._decided_at = min(self._decided_at, now)
            # Reading a long record takes long.
            self._look_at = now + max(DRAWS_LOOK_S, LOOK_SHARE * (time.monotonic() - now))
        if self._decided_at == float("inf"):
            return False
        ranks = range(self._world.spec.size)
        # A rank at work may still raise the error that explains the others'.
        if any(self._world.at_work(rank) for rank in ranks if rank not in results):
            self._at_rest_since = float("inf")
        else:
            self._at_rest_since = min(self._at_rest_since, now)
        if now - self._at_rest_since >= PATIENCE_S:
            return True
        self.in_vain = now - self._decided_at >= self._busy_s
        return self.in_vain

    def _is_diverged(self) -> bool:
        size = self._world.spec.size
        records = {rank: decode(self._world.draws(rank)) for rank in range(size)}
        return bool(divergence(records, are_complete=False))


def _subclass(base: type[BaseException]) -> type[BaseException]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    try:
        return type(base.__name__, (base,), names)
    except TypeError:  # a class that cannot be subclassed
        return type("WorldError", (WorldError,), {"__module__": WorldError.__module__})


def _recast_error(kind: type[BaseException], error: BaseException) -> BaseException:
    """The exception as one of `kind`, made without calling `__init__`, whose arguments
    are unknown.
    """
    out = kind.__new__(kind)
    out.args = error.args
    out.__dict__.update(error.__dict__)
    return out
