"""Worlds that are kept between the tests of a module, and how each of them ends.

Enters: a world whose last test has been torn down, with the fixtures that another test shares.
Leaves: the same world for that test; or, once no test takes it, the end of the world.

Rules that hold inside:

- An idle world ends in one way only, `end_idle`: its ranks tear down every scope that is still set
  up in them, and leave. Where a rank is gone, the others tear down.
- An interrupt of the session cuts that short: the running step has a bounded time to end, and its
  outcome is reported. Another interrupt kills the ranks at once.
- A problem of an idle world is an error of the test that ran last in it, its owner. The
  owner has made all its reports by then, so it makes another one, of its teardown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import pytest

from pytest_dcp._harness.protocol.messages import Go
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.world.outcome import Outcome, combine, is_echo
from pytest_dcp._harness.world.world import World

WIND_DOWN_S = 2.0
"""For the fixtures of ranks that outlived their peers: enough to close their resources."""
HURRIED_S = 10.0
"""For the fixtures of an idle world when the session was interrupted."""

SESSION_ENDS = (KeyboardInterrupt, pytest.exit.Exception)
"""Exceptions that pytest lets pass from inside a test: the session is over."""
PASSED = Outcome("passed", "", (), {})

Key = tuple[str, WorldSpec]
"""The nodeid of a module, and the world that its tests ask for."""


class Owner(Protocol):
    """The test that ran last in a world."""

    def absorb_late(self, world: World, outcome: Outcome) -> None:
        """Keep the ranks' output and warnings while the world is open."""

    def report_late(self, world: World, outcome: Outcome) -> None:
        """Report what went wrong in a world that has ended, if anything did.

        The test has made all its own reports by then.
        """


@dataclass(frozen=True, slots=True)
class TestPlace:
    """A test as ranks find it."""

    index: int = -1
    """In the session's items, as they were when the zygote was forked; -1 for no test."""
    nodeid: str = ""

    def order(self) -> Go:
        """Tear down all that this test does not share; without a test, everything."""
        return Go("teardown", self.index, self.nodeid)


@dataclass(frozen=True, slots=True)
class _Idle:
    world: World
    owner: Owner
    kept_for: TestPlace
    """The test with which the world's fixtures were kept."""


class WarmWorlds:
    """The idle worlds of a session. Not thread-safe."""

    def __init__(self) -> None:
        self._idle: dict[Key, _Idle] = {}

    def keep(self, key: Key, world: World, owner: Owner, kept_for: TestPlace) -> None:
        """A test has ended in `world`, and another may use it."""
        self._idle[key] = _Idle(world, owner, kept_for)

    def take(self, key: Key, place: TestPlace) -> World | None:
        """The world kept under `key`, ready for the test at `place`; None when there is none."""
        self.check()
        idle = self._idle.pop(key, None)
        if idle is None:
            return None
        if idle.kept_for != place:
            idle.world.restart_clock(idle.world.spec.timeout_s)
            try:
                torn = idle.world.run("teardown", place.order())
            except SESSION_ENDS:
                self._retire_cut_off(idle)
                raise
            if torn.kind != "passed":
                self._retire(idle, idle.world.spec.timeout_s, torn)
                return None
        return idle.world

    def check(self) -> None:
        """End the worlds of which a rank has died, and report that."""
        for key, idle in list(self._idle.items()):
            if died := idle.world.find_deaths():
                del self._idle[key]
                self._retire(idle, idle.world.spec.timeout_s, combine(0, {}, died))

    def end_all(self, *, but_module: str | None = None, hurried: bool = False) -> None:
        """End the worlds of every module, or of every module but one."""
        for key in [key for key in self._idle if key[0] != but_module]:
            idle = self._idle.pop(key)
            limit_s = idle.world.spec.timeout_s
            self._retire(idle, min(limit_s, HURRIED_S) if hurried else limit_s)

    def kill_all(self) -> None:
        """Kill the ranks of every world at once: without a teardown."""
        while self._idle:
            self._idle.popitem()[1].world.kill()

    def _retire(self, idle: _Idle, limit_s: float, torn: Outcome | None = None) -> None:
        """End a world and report errors; `torn` is the outcome of its teardown so far."""

        hear = partial(idle.owner.absorb_late, idle.world)
        try:
            if torn is not None:
                hear(torn)
            end_outcome = end_idle(idle.world, limit_s, hear)
            end_outcome = end_outcome if torn is None else join_outcomes(torn, end_outcome)
        except SESSION_ENDS:
            self._retire_cut_off(idle)
            raise
        finally:
            idle.world.kill()
        idle.owner.report_late(idle.world, end_outcome)

    def _retire_cut_off(self, idle: _Idle) -> None:
        """End a world whose teardown an interrupt has cut off, and report what went wrong."""
        hear = partial(idle.owner.absorb_late, idle.world)
        try:
            end_outcome = end_cut_off(idle.world, hear)
        finally:
            idle.world.kill()
        idle.owner.report_late(idle.world, end_outcome)


def end_cut_off(world: World, hear: Callable[[Outcome], None]) -> Outcome:
    """End a world whose last phase an interrupt cut off. Returns the errors in that phase and
    since.

    Its ranks finish their teardown, unless another interrupt came and they were killed.
    """
    cut = PASSED if world.cut_off is None else world.cut_off.outcome
    if world.cut_off is not None:
        hear(cut)
    if world.is_over:
        return cut
    return join_outcomes(cut, end_idle(world, min(world.spec.timeout_s, HURRIED_S), hear))


def end_idle(world: World, limit_s: float, hear: Callable[[Outcome], None]) -> Outcome:
    """Tear down every scope in the ranks, and have them leave. Returns the errors.

    `limit_s` is for the teardown. `hear` is called with each outcome while the world's output can
    still be read.
    """
    died = combine(0, {}, world.find_deaths())
    if died.failures:
        hear(died)
    if died.failures or not world.all_ranks_idle:
        return join_outcomes(died, tear_down_survivors(world))
    world.restart_clock(limit_s)
    torn = world.run("teardown", TestPlace().order())
    hear(torn)
    return join_outcomes(torn, world.close())


def tear_down_survivors(world: World) -> Outcome:
    """Tear down in the ranks that outlived a failure, and end the world. Returns the new errors.

    Errors that only follow from a peer's end are left out, and so is a rank that was not done in
    time: the peers that its fixtures may wait for are gone.
    """
    torn = world.tear_down_survivors(TestPlace().order(), WIND_DOWN_S)
    failures = [
        failure for failure in torn.failures if failure.kind == "failed" and not is_echo(failure)
    ]
    reporting = {failure.rank for failure in failures}
    if torn.session_end is not None:
        reporting.add(torn.session_end.rank)
    return combine(0, {rank: torn.results[rank] for rank in reporting}, failures)


def join_outcomes(*outcomes: Outcome) -> Outcome:
    """Outcomes of the same ranks, one after the other, as one. Pure (no I/O).

    Without failures the first that did not pass counts, or the last one.
    """
    failing = [outcome for outcome in outcomes if outcome.failures]
    bad = [*failing, *(outcome for outcome in outcomes if outcome.kind != "passed")]
    one = bad[0] if bad else outcomes[-1]
    if len(failing) > 1:
        results = {rank: one for outcome in failing[::-1] for rank, one in outcome.results.items()}
        one = combine(0, results, [f for outcome in failing for f in outcome.failures])
    ends = (outcome.session_end for outcome in outcomes if outcome.session_end is not None)
    return replace(one, session_end=next(ends, None))


@contextmanager
def as_running_item(item: pytest.Item) -> Iterator[None]:
    """Report of `item` though another one is running.

    A worker of pytest-xdist takes every report for one of the item that it runs. Can go when the
    worker looks at the report instead. (It has its code from afar, so its module has another name.)
    """
    plugins: Any = item.config.pluginmanager.get_plugins()
    worker = next(
        (plugin for plugin in plugins if type(plugin).__name__ == "WorkerInteractor"), None
    )
    running = getattr(worker, "item_index", None)
    if worker is None or running is None:
        yield
        return
    worker.item_index = item.session.items.index(item)
    try:
        yield
    finally:
        worker.item_index = running
