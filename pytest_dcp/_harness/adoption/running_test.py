"""An adopted test while it runs: the processes that it has started, and what became of them.

Enters: processes that start, and waits of the test for them. Leaves: their outcomes as exceptions
in the test, or, for failures that the test never looks at, as the test's own failure.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pytest_dcp._harness.adoption.failures import Failures
from pytest_dcp._harness.adoption.lookout import Lookout
from pytest_dcp._harness.adoption.process_set import ProcessSet, deadline_of
from pytest_dcp._harness.adoption.rank_popen import RankPopen
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.protocol.process_call import ProcessCall
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp.errors import RankFailure

STEP_S = 0.02
"""How long the processes of one world are looked after before those of the next."""
VAIN_S = 5.0
"""How long a test may go on when all its processes have ended, and one has failed."""
ENDED_BY_TEST = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
"""Exit codes of a process that its test has ended."""
MARGIN = 0.1
"""Of pytest-timeout's limit: left for stacks and reports, before it ends the test itself."""


class RunningTest:
    """One adopted item, from its setup to its teardown."""

    def __init__(self, item: pytest.Item, index: int, harness: Harness) -> None:
        self.item = item
        self.index = index
        self.harness = harness
        self.failures = Failures(item, harness)
        self.sets: list[ProcessSet] = []
        self.own_processes: list[Any] = []
        """Processes of the suite that run as they are written."""
        self.gathering: ProcessSet | None = None
        """The world whose processes start now."""
        self._limit_s = harness.options.defaults.timeout_s
        self._began_s = 0.0
        """When a limit of the whole test began; 0: each wait has its own."""
        self._is_busy = False
        self._lookout = Lookout(self._look)
        self._vain_since_s: float | None = None
        """Since when the test does something else though all processes have ended, one failed."""

    def limit(self, timeout_s: float) -> None:
        """pytest-timeout's limit, which counts from here: the processes end before it."""
        self._limit_s, self._began_s = timeout_s * (1 - MARGIN), time.monotonic()

    def time_left_s(self) -> float:
        """How long processes that begin now may run, in seconds."""
        spent_s = time.monotonic() - self._began_s if self._began_s else 0.0
        return max(0.0, round(self._limit_s - spent_s, 1))

    # Processes.

    @contextmanager
    def gather(self, size: int) -> Iterator[ProcessSet]:
        """Inside the block, processes that start are the ranks of one world; they begin after."""
        with self.busy():
            self.gathering = processes = ProcessSet(self, size)
            self.sets.append(processes)
            try:
                yield processes
                processes.begin()
            except BaseException:
                processes.is_judged = True
                processes.kill()
                raise
            finally:
                self.gathering = None
        self._lookout.start()

    def start_alone(self, call: ProcessCall, *, daemon: bool) -> RankPopen:
        """A process in a world of its own."""
        with self.busy():
            processes = ProcessSet(self, 1)
            self.sets.append(processes)
            popen = processes.add(call, daemon=daemon)
            processes.begin()
        self._lookout.start()
        return popen

    @property
    def port(self) -> int:
        """The port at which process groups of processes that start one by one meet."""
        alone = [one for one in self.sets if one.size == 1]
        return alone[0].port if alone else 0

    def drive(self, is_done: Callable[[], bool], within_s: float | None = None) -> None:
        """Look after all processes until `is_done`, they have ended, or the time is over."""
        if self._is_busy:
            return
        deadline = deadline_of(within_s)
        with self.busy():
            while True:
                self._advance(0.0 if is_done() or deadline <= time.monotonic() else STEP_S)
                if is_done() or deadline <= time.monotonic() or not self._running_sets():
                    return

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside the block, this thread uses a world: the lookout must not."""
        before, self._is_busy = self._is_busy, True
        try:
            yield
        finally:
            self._is_busy = before

    def _look(self) -> None:
        """Between two steps of the test: look after its processes, and end a wait in vain."""
        if self._is_busy:
            return
        self.drive(lambda: True)
        failed = any(_has_failed(one) for one in self.sets)
        if not failed or self._running_sets():
            self._vain_since_s = None
        elif self._vain_since_s is None:
            self._vain_since_s = time.monotonic()
        elif time.monotonic() - self._vain_since_s > VAIN_S:
            self._vain_since_s = None
            raise self.failures.error_for(next(self._unjudged_outcomes()))

    def _running_sets(self) -> list[ProcessSet]:
        return [one for one in self.sets if one.is_running]

    def _advance(self, within_s: float) -> None:
        running = self._running_sets()
        for one in running:
            one.advance(within_s / len(running))
        if any(one.size == 1 and _has_failed(one) for one in self.sets):
            for one in self._running_sets():
                if one.size == 1:
                    one.world.see_failure_elsewhere()

    # The end of the call.

    def conclude_call(self, *, has_failed: bool) -> None:
        """The test's own code has ended. Raises for failures of processes that it did not judge."""
        self._lookout.stop()
        for one in self._running_sets():
            if has_failed or all(popen.daemon for popen in one.popens):
                one.advance(0.0)
                if one.outcome is None:
                    one.is_judged = one.is_judged or not one.world.has_failed
                    one.kill()
        self.drive(lambda: False)
        outcomes = [*self._unjudged_outcomes()]
        self.own_processes.clear()
        for one in self.sets:
            one.is_judged = True
        for outcome in outcomes:
            self.failures.show_beside(outcome)
        bad = next((one for one in outcomes if one.kind == "failed"), None) or (
            outcomes[0] if outcomes else None
        )
        if bad is not None and not has_failed:
            __tracebackhide__ = True
            raise self.failures.error_for(bad)

    def _unjudged_outcomes(self) -> Iterator[Outcome]:
        """The outcomes that did not pass; of processes that started one by one, one for all."""
        for one in self.sets:
            outcome = one.outcome
            is_open = one.size > 1 and not one.is_judged
            if is_open and outcome is not None and outcome.kind != "passed":
                yield outcome
        alone = [one for one in self.sets if one.size == 1 and one.outcome is not None]
        joined = join_alone(alone)
        if joined is not None:
            yield joined
        if failures := [*failures_of(self.own_processes)]:
            yield combine(0, {}, failures)

    def end(self) -> None:
        """The item is over: end the processes that it left."""
        self._lookout.stop()
        for one in self.sets:
            one.kill()
        self.sets.clear()


def join_alone(sets: Sequence[ProcessSet]) -> Outcome | None:
    """One outcome of processes that started one by one, numbered as they started.

    None where all passed, or the test has judged each failure itself.
    """
    results: dict[int, Done] = {}
    failures: list[RankFailure] = []
    for rank, one in enumerate(sets):
        outcome = one.outcome
        if outcome is None or one.is_judged or one.popens[0].is_judged:
            continue
        if (result := outcome.results.get(0)) is not None:
            results[rank] = result
        failures += [replace(failure, rank=rank) for failure in outcome.failures]
    if not failures and all(result.outcome == "passed" for result in results.values()):
        return None
    return combine(0, results, failures)


def failures_of(processes: Sequence[Any]) -> Iterator[RankFailure]:
    """A failure for each ended process that was no rank, and whose exit code was not looked at."""
    for number, process in enumerate(processes):
        popen = process._popen  # None for a process that the test has closed
        code = popen.poll() if popen is not None else None
        if code in (None, 0, *ENDED_BY_TEST) or getattr(popen, "is_judged", False):
            continue
        text = f"{process.name}, which ran as it is written, ended with exit code {code}"
        # Shown without a rank's number.
        yield RankFailure(number, "diverged", "call", time.monotonic(), text)


def _has_failed(one: ProcessSet) -> bool:
    if one.is_judged or any(popen.is_judged for popen in one.popens):
        return False
    return one.world.has_failed or (one.outcome is not None and one.outcome.kind == "failed")
