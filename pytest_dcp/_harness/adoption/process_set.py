"""Processes that an adopted test starts together: the ranks of one world.

Enters: `Process` objects that are about to start. Leaves: a `RankPopen` for each, and in the end
one `Outcome`. The ranks are forked before the first process starts, so that each has a process id
at once; their work begins together, in `begin`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_dcp._harness.adoption.rank_popen import RankPopen
from pytest_dcp._harness.controller.exit_warnings import warn_of_end
from pytest_dcp._harness.controller.item_output import ItemOutput
from pytest_dcp._harness.controller.rank_warnings import warn_again
from pytest_dcp._harness.controller.report import merged_sections
from pytest_dcp._harness.controller.warm_worlds import join_outcomes
from pytest_dcp._harness.protocol.launcher import is_worth_preloading
from pytest_dcp._harness.protocol.messages import Down, RunProcess
from pytest_dcp._harness.protocol.process_call import ProcessCall
from pytest_dcp._harness.protocol.world_spec import NO_GROUP, WorldSpec
from pytest_dcp._harness.world.outcome import Outcome
from pytest_dcp._harness.world.process_world import ProcessWorld

if TYPE_CHECKING:
    from pytest_dcp._harness.adoption.running_test import RunningTest


class ProcessSet:
    """The processes of one world."""

    def __init__(self, test: RunningTest, size: int) -> None:
        self.test = test
        self.size = size
        self.popens: list[RankPopen] = []
        self.outcome: Outcome | None = None
        """Set when every process has ended."""
        self.is_judged = False
        """Whether the outcome was raised in the test, or judged by it."""
        self.skips: dict[int, str] = {}
        """Exit codes that mean a skip, with its reason."""
        self.error_code: int | None = None
        """The exit code after an exception that the process has caught."""
        self.is_running = False
        """Whether the processes have begun, and not all have ended."""
        self._orders: dict[int, Down] = {}
        self._output = ItemOutput(test.item, size, test.harness.options.report_ranks)
        spec = WorldSpec(size, NO_GROUP, "cpu", (size,), None, math.inf, "test")
        seed = test.harness.seed_of(test.item.nodeid)
        self.world, booted = test.harness.open_as(ProcessWorld, spec, seed)
        if booted.kind != "passed":
            self.world.kill()
            raise test.failures.error_for(booted)
        self.port = self.world.port

    @property
    def is_full(self) -> bool:
        """Whether every rank has its process."""
        return len(self.popens) == self.size

    def call_of(self, target: object, name: str) -> ProcessCall:
        """A process of this world, as its rank gets it. Raises any exception of its pickling."""
        return call_of(target, name, skips=self.skips, error_code=self.error_code)

    def add(self, call: ProcessCall, *, daemon: bool = False) -> RankPopen:
        """The next rank runs this process, once `begin` is called."""
        popen = RankPopen(self, len(self.popens), daemon=daemon)
        self._orders[popen.rank] = order_of(self.test, call)
        self.popens.append(popen)
        return popen

    def begin(self) -> None:
        """Start the processes together. A rank without a process has nothing to do."""
        while not self.is_full:
            self.add(call_of((int, (), {}), "idle"))
        self.restart_clock()
        self.world.begin_each("call", self._orders)
        self.is_running = True

    def take_over(self, test: RunningTest) -> None:
        """The next test runs in the same processes."""
        self.test = test
        self._output = ItemOutput(test.item, self.size, test.harness.options.report_ranks)

    def restart_clock(self) -> None:
        """The time limit counts from here."""
        self.world.restart_clock(self.test.time_left_s())

    def drive_all(self, is_done: Callable[[], bool], within_s: float | None = None) -> None:
        """Look after all processes of the test; see `RunningTest.drive`."""
        self.test.drive(is_done, within_s)

    def advance(self, within_s: float) -> None:
        """Handle what happens within the time, and the end of the last process."""
        if self.world.advance(within_s):
            self.conclude()
        for popen in self.popens:
            if self.world.has_ended(popen.rank):
                popen.see_end(self.world.exit_code(popen.rank) or 0)

    def conclude(self) -> None:
        """Every process has answered or ended: have them exit, and join their outcomes."""
        self.is_running = False
        outcome = self.world.finish()
        self.absorb(outcome)
        codes = {popen.rank: self.world.exit_code(popen.rank) for popen in self.popens}
        closing = self.world.close()
        self._absorb_exit()
        for popen in self.popens:
            popen.see_end(codes[popen.rank] or self.world.exit_code(popen.rank) or 0)
        self.outcome = join_outcomes(outcome, closing)
        warn_again(outcome)
        warn_of_end(self.test.item.nodeid, self.world)

    def absorb(self, outcome: Outcome) -> None:
        """Take over the captured output of a phase."""
        self._output.absorb(self.world, outcome, "call", frozenset(self.world.lost))
        imported = {name for result in outcome.results.values() for name in result.imported}
        self.test.harness.launcher().preload(sorted(filter(is_worth_preloading, imported)))

    def _absorb_exit(self) -> None:
        printed = (
            (rank, *part) for rank, one in self.world.exited.items() for part in one.sections
        )
        for _, name, text in merged_sections(printed):
            self.test.item.add_report_section("call", name, text)

    def kill(self) -> None:
        """End everything now."""
        self.is_running = False
        self.world.kill()
        for popen in self.popens:
            popen.see_end(-9)


def order_of(test: RunningTest, call: ProcessCall) -> RunProcess:
    """The order by which a rank runs a process."""
    seed = test.harness.seed_of(test.item.nodeid)
    return RunProcess(test.index, test.item.nodeid, seed, call.dump())


def call_of(
    target: object,
    name: str,
    *,
    skips: dict[int, str] | None = None,
    port: int = 0,
    error_code: int | None = None,
) -> ProcessCall:
    """A process that begins here and now. `target`: (function, args, kwargs).

    Raises any exception of the target's own reduction.
    """
    from pytest_dcp._harness.adoption.foreign_pickles import dump_target

    return ProcessCall(
        dump_target(target), name, dict(os.environ), os.getcwd(), skips or {}, error_code, port
    )


def deadline_of(within_s: float | None) -> float:
    """When a wait ends, on the monotonic clock; without a limit never."""
    return math.inf if within_s is None else time.monotonic() + within_s
