"""torch's `MultiProcContinuousTest`: one world for the tests of a class, as long as they pass.

The class talks to its ranks through two queues each: it puts the id of a test into one and takes
the result from the other. Here the queues are stand-ins that lead the ranks of one world:

    put(id) for each rank      the first begins the test on all ranks
    get() for each rank        the first waits for all; raises their failure, or returns the id
    put(None) for each rank    nothing
    process.join()             the first has the ranks leave their group, and end

torch skips the tests that follow a failure. Here they run in a new world.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

from pytest_dcp._harness.adoption.process_hooks import CurrentTest
from pytest_dcp._harness.adoption.process_set import ProcessSet, order_of
from pytest_dcp._harness.adoption.running_test import RunningTest
from pytest_dcp._harness.world.outcome import Outcome
from pytest_dcp._torch_internals import foreign_tests

Target = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]


def start_hook(original: Callable[..., Any], current: CurrentTest) -> Any:
    """`_spawn_processes`, a class method."""

    def spawn_processes(cls: Any, world_size: int) -> None:
        test = current()
        if test is None or foreign_tests.has_own_loop(cls):
            original(cls, world_size)
            return
        ranks = ContinuousRanks(cls, int(world_size), current)
        with tempfile.NamedTemporaryFile(delete=False) as file:
            cls.rdvz_file = file.name
        cls.processes = [RankStandIn(ranks) for _ in range(ranks.size)]
        cls.task_queues = [TaskQueue(ranks) for _ in range(ranks.size)]
        cls.completion_queues = [CompletionQueue(ranks) for _ in range(ranks.size)]

    return classmethod(spawn_processes)


class ContinuousRanks:
    """The ranks of one class."""

    def __init__(self, cls: Any, size: int, current: CurrentTest) -> None:
        self.cls = cls
        self.size = size
        self._current = current
        self._processes: ProcessSet | None = None
        self._test_id = ""
        """Of the test that the ranks run; empty for none."""
        self._result: object = None

    def begin(self, test_id: str) -> None:
        """Run a test on all ranks. Raises their failure to join the process group."""
        if self._test_id == test_id:
            return  # another rank's queue has begun it
        test = self._current()
        if test is None:
            raise RuntimeError(f"{test_id} is not adopted, but the first test of its class was")
        self._test_id, self._result = test_id, None
        if self._processes is None or self._processes.world.is_over:
            self._processes = self._join_group(test)
        if self._result is None:
            self._processes.take_over(test)
            call: Target = (foreign_tests.run_continuous_test, (self.cls, test_id), {})
            self._begin(self._processes, [call] * self.size)

    def result(self) -> object:
        """The id of the test that all ranks have passed, or its skip. Raises their failure."""
        if self._result is None and self._processes is not None:
            outcome = self._finish(self._processes)
            self._result = self._test_id
            if outcome.kind == "skipped":
                self._result = self._processes.test.failures.error_for(outcome)
            elif outcome.kind != "passed":
                self._fail(self._processes, outcome)
        return self._result

    def end(self) -> None:
        """Have the ranks leave their group and end. Raises the failure of that."""
        processes, self._processes = self._processes, None
        test = self._current()
        if processes is None or processes.world.is_over or test is None:
            return
        processes.take_over(test)
        leave: Target = (foreign_tests.leave_continuous_group, (self.cls,), {})
        self._begin(processes, [leave] * self.size)
        processes.is_judged = True
        with test.busy():
            processes.conclude()
        if processes.outcome is not None and processes.outcome.kind != "passed":
            raise test.failures.error_for(processes.outcome)

    def _join_group(self, test: RunningTest) -> ProcessSet:
        """A new world whose ranks have joined the class's process group."""
        with test.busy():
            processes = ProcessSet(test, self.size)
        processes.skips = foreign_tests.skip_reasons()
        if os.path.getsize(self.cls.rdvz_file):
            with tempfile.NamedTemporaryFile(delete=False) as file:
                self.cls.rdvz_file = file.name
        join = foreign_tests.join_continuous_group
        file_name = self.cls.rdvz_file
        self._begin(
            processes,
            [(join, (self.cls, rank, self.size, file_name), {}) for rank in range(self.size)],
        )
        outcome = self._finish(processes)
        if outcome.kind == "skipped":
            self._result = test.failures.error_for(outcome)
            processes.kill()
        elif outcome.kind != "passed":
            self._fail(processes, outcome)
        return processes

    def _begin(self, processes: ProcessSet, targets: list[Target]) -> None:
        calls = [processes.call_of(one, f"process {rank}") for rank, one in enumerate(targets)]
        orders = [order_of(processes.test, call) for call in calls]
        with processes.test.busy():
            processes.restart_clock()
            processes.world.begin_each("call", dict(enumerate(orders)))

    def _finish(self, processes: ProcessSet) -> Outcome:
        with processes.test.busy():
            outcome = processes.world.finish()
            processes.absorb(outcome)
        return outcome

    def _fail(self, processes: ProcessSet, outcome: Outcome) -> None:
        __tracebackhide__ = True
        self._test_id = ""
        processes.kill()
        raise processes.test.failures.error_for(outcome)


class TaskQueue:
    """The queue that gives a rank the ids of its tests."""

    def __init__(self, ranks: ContinuousRanks) -> None:
        self._ranks = ranks

    def put(self, test_id: str | None) -> None:
        """A test for this rank; None: there are no more."""
        __tracebackhide__ = True
        if test_id is not None:
            self._ranks.begin(test_id)


class CompletionQueue:
    """The queue from which the class takes a rank's results."""

    def __init__(self, ranks: ContinuousRanks) -> None:
        self._ranks = ranks

    def get(self, timeout: float | None = None) -> object:
        """The result of the running test; `timeout` is torch's, ours is the test's."""
        __tracebackhide__ = True
        return self._ranks.result()

    def empty(self) -> bool:
        """Whether nothing has come: a result comes only to `get`."""
        return True


class RankStandIn:
    """A rank's process, for the class that waits for its end."""

    exitcode = 0

    def __init__(self, ranks: ContinuousRanks) -> None:
        self._ranks = ranks

    def is_alive(self) -> bool:
        """A rank outlives the tests of its class."""
        return True

    def join(self) -> None:
        """Wait for the rank's end."""
        __tracebackhide__ = True
        self._ranks.end()
