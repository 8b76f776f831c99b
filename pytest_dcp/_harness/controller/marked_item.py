"""A marked item in the controller: stays an ordinary pytest item, but each phase runs on all ranks.

Enters: an item and its `WorldSpec`. `attach` replaces the item's own setup, runtest and teardown by
one lockstep phase each; the features of pytest and plugins around them (xfail, reruns, -x,
durations, junit, xdist) need no special code. Leaves: one report per phase, made by pytest.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_dcp._harness.controller import losing_fixtures, report
from pytest_dcp._harness.controller.exit_warnings import warn_of_end
from pytest_dcp._harness.controller.item_output import ItemOutput, merged_properties
from pytest_dcp._harness.controller.rank_warnings import warn_again, warn_of_changes
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.controller.warm_worlds import (
    HURRIED_S,
    PASSED,
    SESSION_ENDS,
    Key,
    TestPlace,
    as_running_item,
    end_cut_off,
    end_idle,
    join_outcomes,
    tear_down_survivors,
)
from pytest_dcp._harness.lockstep.fresh_folders import scratch_beside
from pytest_dcp._harness.protocol.launcher import is_worth_preloading
from pytest_dcp._harness.protocol.messages import Go, Phase, RunItem
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.rank import carried_state
from pytest_dcp._harness.world.cut_off import CutOff
from pytest_dcp._harness.world.interrupt_clock import TORN_DOWN
from pytest_dcp._harness.world.outcome import (
    Outcome,
    combine,
    in_step,
    is_echo,
    lost_lines,
)
from pytest_dcp._harness.world.world import World
from pytest_dcp._pytest_internals import AbstractRaises, catch_warnings_for_item, xfailed_key
from pytest_dcp.errors import WorldError

if TYPE_CHECKING:
    from pytest_dcp._harness.lockstep.engine import FoundError

ITEM_KEY = pytest.StashKey["MarkedItem"]()

_folders = itertools.count()


@dataclass(slots=True)
class MarkedItem:
    """The controller's memory of one item while it runs."""

    item: pytest.Item
    index: int
    """In the session's items at the time of the fork."""
    spec: WorldSpec
    explicit_limit: bool
    """Whether the marker itself names a time limit."""
    harness: Harness
    world: World | None = None
    nextitem: pytest.Item | None = None
    limit_s: float = 0.0
    failed: bool = False
    raised: BaseException | None = None
    """The exception of the last failed phase, and its outcome."""
    outcome: Outcome | None = None
    found: FoundError | None = None
    """The failures that Hypothesis found."""
    unexpectedly: str | None = None
    """The reason of an xfail marker that the test added itself, and then passed."""
    checkpoint_dir: Path = field(default_factory=Path)
    lost: frozenset[int] = frozenset()
    """Ranks lost because the test asked for it, and reported already."""
    output: ItemOutput = field(init=False)
    torn_before: Outcome = PASSED
    """How the item was torn down in worlds that were replaced while it ran."""

    def begin(self) -> None:
        """The item's protocol starts."""
        self.limit_s = self.spec.timeout_s

    def begin_teardown(self, nextitem: pytest.Item | None) -> None:
        """The item's teardown starts; no `nextitem` when the session ends or stops."""
        self.nextitem = nextitem

    def limit(self, timeout_s: float) -> None:
        """pytest-timeout's limit: it replaces the default; of two explicit limits the lower
        counts."""
        self.limit_s = min(timeout_s, self.spec.timeout_s) if self.explicit_limit else timeout_s
        if self.world is not None:
            self.world.restart_clock(self.limit_s)

    # The three phases, instead of the item's own.

    def setup(self) -> None:
        """Start or take a world, and set the item up in every rank."""
        losing_fixtures.warn_of(self.item)
        self.failed, self.raised, self.outcome, self.world = False, None, None, None
        self.lost = frozenset()
        self.unexpectedly = None
        self.torn_before = PASSED
        self.output = ItemOutput(self.item, self.spec.size, self.harness.options.report_ranks)
        seed = self.harness.seed_of(self.item.nodeid)
        self.checkpoint_dir = self.harness.folder / f"checkpoint{next(_folders)}"
        self.world = self.harness.warm.take(self._warm_key(), self._place())
        if self.world is None:
            self.world, booted = self.harness.open(self.spec, seed)
            self._absorb(self.world, booted, "setup")
            if booted.kind != "passed":
                self.world.kill()  # no item was begun in it: there is nothing to tear down
            self._raise_for(booted)
        self.world.restart_clock(self.limit_s)
        self._conclude(self.world, self.world.run("setup", self.order()), "setup")

    def order(self) -> RunItem:
        """The order that begins the item."""
        seed = self.harness.seed_of(self.item.nodeid)
        folder, location = str(self.checkpoint_dir), self.item.location
        return RunItem(self.index, self.item.nodeid, seed, folder, location)

    def runtest(self) -> None:
        """Call the test in every rank."""
        if self.world is None:
            raise WorldError("the test was called, but its setup started no world")
        self.found = None
        try:
            outcome = self.world.run("call", Go("call"))
            if any(result.awaits for result in outcome.results.values()):
                outcome = self._run_properties(outcome)
        except BaseException:  # of this process: an interrupt, a timer
            self.failed = True
            raise
        outcome = in_step(outcome)
        self._conclude(self.world, outcome, "call")
        self.unexpectedly = next(
            (one.text for one in outcome.results.values() if one.xpassed), None
        )

    def _run_properties(self, outcome: Outcome) -> Outcome:
        """Lead the ranks through the examples of the properties that they came to."""
        __tracebackhide__ = True
        from pytest_dcp._harness.controller import property_item

        try:
            return property_item.run_properties(property_item.ItemRanks(self), outcome)
        except property_item.FoundError as found:
            self.found = found
            return found.found[0].outcome

    def teardown(self) -> None:
        """Tear the item down in every rank, and the world unless it is kept warm."""
        if self.world is None:
            return
        world, is_kept, is_cut_off = self.world, False, False
        try:
            if (cut := world.cut_off) is not None:  # and the session goes on: by a timer
                self._report_cut_off(world, cut)
            torn = join_outcomes(self.torn_before, combine(0, {}, world.find_deaths()))
            if world.survivors_idle:
                is_kept, end_outcome = self._tear_down_whole(world, keep=torn.kind == "passed")
                torn = join_outcomes(torn, end_outcome)
            elif not world.is_over:
                torn = join_outcomes(torn, tear_down_survivors(world))
            self._raise_for(torn)
        except SESSION_ENDS as end:
            is_cut_off = end is not self.raised
            raise
        finally:
            if not is_cut_off:  # else `end_cut_off` follows
                self._let_go(world, is_kept=is_kept)

    def _let_go(self, world: World, *, is_kept: bool) -> None:
        """The item is over; so is its world, unless it is kept."""
        self.world = None
        if not is_kept:
            world.kill()
        self._drop_checkpoint_dir()
        # Where warnings are errors, one must not take the place of a failure.
        failing = sys.exc_info()[0] is not None
        with contextlib.suppress(Warning) if failing else contextlib.nullcontext():
            self._absorb_end(world)

    def end_cut_off(self) -> None:
        """The session has ended while this item ran: have its ranks tear down every scope.

        The ranks' exceptions are reported. Does nothing if the ranks have ended.
        """
        world, self.world = self.world, None
        if world is None:
            return
        hear = partial(self.absorb_late, world)
        cut = world.cut_off
        try:
            if cut is None or cut.phase in TORN_DOWN:
                end_outcome = end_cut_off(world, hear)
            else:
                self._report_cut_off(world, cut)
                end_outcome = PASSED if world.is_over else end_idle(world, HURRIED_S, hear)
        finally:
            world.kill()
            self._drop_checkpoint_dir()
        self.report_late(world, end_outcome)

    def _report_cut_off(self, world: World, cut: CutOff) -> None:
        """Report the failures in a phase that was cut off, except those caused by the cut."""
        self._absorb(world, cut.outcome, cut.phase)
        if not all(one.kind == "failed" and is_echo(one) for one in cut.outcome.failures):
            self.report_late(world, cut.outcome, cut.phase)

    def _tear_down_whole(self, world: World, *, keep: bool) -> tuple[bool, Outcome]:
        """Tear down in every rank, and end the world unless it is kept. Returns whether it is kept,
        and the outcome.
        """
        follower = self._follower() if keep and world.all_ranks_idle else None
        torn = world.run("teardown", (follower or TestPlace()).order())
        torn = torn if self.failed else in_step(torn)
        self._absorb(world, torn, "teardown")
        reusable = world.all_ranks_idle and self._absorb_whole_item(torn)
        if torn.kind == "passed" and follower is not None:
            if reusable:
                self.harness.warm.keep(self._warm_key(), world, self, follower)
                return True, torn
            warn_of_changes(self.item.nodeid, torn)
            torn = world.run("teardown", TestPlace().order())  # the fixtures kept for the next test
            self._absorb(world, torn, "teardown")
        return False, join_outcomes(torn, world.close())

    def note_teardown(self, torn: Outcome) -> None:
        """Record, once, failures during the item's teardown in a world that is being replaced."""
        noted_summaries = {failure.summary for failure in self.torn_before.failures}
        if any(failure.summary not in noted_summaries for failure in torn.failures):
            self.torn_before = join_outcomes(self.torn_before, torn)

    # Warm worlds.

    def _warm_key(self) -> Key:
        return module_of(self.item), self.spec

    def _place(self) -> TestPlace:
        return TestPlace(self.index, self.item.nodeid)

    def _follower(self) -> TestPlace | None:
        """The test that takes this world next, or another test of its module; None for none.

        The test after the next one is known only if pytest itself iterates over the session's
        items: a worker of pytest-xdist gets one item at a time.
        """
        nextitem = self.nextitem
        if self.spec.isolation != "module" or self.failed or nextitem is None:
            return None
        items, after = self.item.session.items, self.index + 1
        in_order = after < len(items) and items[after] is nextitem
        if not in_order or hasattr(self.item.config, "workerinput"):
            return _place_of(nextitem) if module_of(nextitem) == module_of(self.item) else None
        for item in itertools.islice(items, after, None):
            if module_of(item) != module_of(self.item):
                return None
            marked = item.stash.get(ITEM_KEY, None)
            if marked is not None and marked.spec == self.spec:
                return marked._place()
        return None

    def absorb_late(self, world: World, outcome: Outcome) -> None:
        """Add output and warnings of this test's ranks from after the test."""
        self._absorb(world, outcome, "teardown")
        with self._recording_warnings():
            self._absorb_whole_item(outcome)

    def report_late(self, world: World, outcome: Outcome, when: Phase = "teardown") -> None:
        """Report errors in this test's world after the test, as of one of the test's phases."""

        def conclude() -> None:
            __tracebackhide__ = True
            try:
                self._raise_for(outcome)
            finally:
                self._absorb_end(world)

        with self._recording_warnings():
            call = pytest.CallInfo.from_call(
                conclude,
                when=when,  # type: ignore[arg-type]  # the three phases of an item are pytest's own
                reraise=None,
            )
        if call.excinfo is not None:
            with as_running_item(self.item):
                ihook = self.item.ihook
                rep = ihook.pytest_runtest_makereport(item=self.item, call=call)
                ihook.pytest_runtest_logreport(report=rep)
        if outcome.kind in ("exit", "interrupt"):
            self.item.session.shouldstop = outcome.reason

    def _recording_warnings(self) -> contextlib.AbstractContextManager[None]:
        """As pytest does around each item, by the filters that are set for this one."""
        return catch_warnings_for_item(
            config=self.item.config, ihook=self.item.ihook, when="runtest", item=self.item
        )

    # Results from the ranks.

    def _conclude(self, world: World, outcome: Outcome, when: Phase) -> None:
        self._absorb(world, outcome, when)
        self._raise_for(outcome)

    def _absorb(self, world: World, outcome: Outcome, when: Phase) -> None:
        """Take over the captured output, the properties and the subtests of a phase."""
        self.output.absorb(world, outcome, when, self.lost)
        if new := [one for rank, one in outcome.lost.items() if rank not in self.lost]:
            self.item.add_report_section(when, "lost as asked", "\n".join(lost_lines(new)))
        self.lost = frozenset(outcome.lost)
        self.item.user_properties += merged_properties(outcome)
        if when == "teardown":
            payloads = {
                rank: result.payload for rank, result in outcome.results.items() if result.payload
            }
            carried_state.deliver(self.item, payloads, self.spec.size)
        self._log_subtests(world)

    def _raise_for(self, outcome: Outcome) -> None:
        if outcome.kind == "passed":
            return
        if outcome.kind in ("failed", "exit", "interrupt"):
            self.failed = True
        outcome = report.lead_with_unexpected(outcome, self.expects)
        if outcome.kind == "failed" and outcome.session_end is not None:
            self.harness.end_after_item(outcome.session_end, self.item.nodeid)
        self.outcome = outcome
        self.raised = report.exception_for(outcome, self.item.nodeid)
        raise self.raised

    def expects(self, error: BaseException) -> bool:
        """Whether the test's xfail marker expects this exception."""
        xfailed = self.item.stash.get(xfailed_key, None)
        if xfailed is None or xfailed.raises is None:
            return xfailed is not None
        if isinstance(xfailed.raises, AbstractRaises):
            return xfailed.raises.matches(error)
        return isinstance(error, xfailed.raises)

    def _log_subtests(self, world: World) -> None:
        reports = world.take_sub_reports()
        if reports:
            from pytest_dcp._harness.controller import subtests

            subtests.log(self.item, reports)

    def _absorb_whole_item(self, outcome: Outcome) -> bool:
        """Warn again of what ranks warned of, once; whether the world can be kept."""
        imported = {name for result in outcome.results.values() for name in result.imported}
        self.harness.launcher().preload(sorted(filter(is_worth_preloading, imported)))
        warn_again(outcome)
        return all(result.reusable for result in outcome.results.values())

    def _absorb_end(self, world: World) -> None:
        """Keep the output of ranks during their exit, and warn about errors in it."""
        __tracebackhide__ = True
        printed = ((rank, *part) for rank, one in world.exited.items() for part in one.sections)
        for _, name, text in report.merged_sections(printed):
            self.item.add_report_section("teardown", name, text)
        warn_of_end(self.item.nodeid, world)

    def _drop_checkpoint_dir(self) -> None:
        """By pytest's own retention policy for tmp_path, when every rank is gone."""
        policy = self.item.config.getini("tmp_path_retention_policy")
        if policy == "none" or (policy == "failed" and not self.failed):
            for folder in (self.checkpoint_dir, scratch_beside(self.checkpoint_dir)):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(folder)


def attach(item: pytest.Item, marked: MarkedItem) -> None:
    """Have the item's phases run in a world."""
    item.stash[ITEM_KEY] = marked
    item.setup = marked.setup  # type: ignore[method-assign]  # this item only, not its class
    item.runtest = marked.runtest  # type: ignore[method-assign]
    item.teardown = marked.teardown  # type: ignore[method-assign]


def module_of(item: pytest.Item) -> str:
    """The nodeid of the module that an item is in, or its own without one."""
    module = item.getparent(pytest.Module)
    return module.nodeid if module is not None else item.nodeid


def _place_of(item: pytest.Item) -> TestPlace:
    marked = item.stash.get(ITEM_KEY, None)
    index = marked.index if marked is not None else item.session.items.index(item)
    return TestPlace(index, item.nodeid)
