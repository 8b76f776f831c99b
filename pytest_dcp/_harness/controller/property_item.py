"""A marked item whose ranks run the examples of a property: the item as the engine sees it, and the
report.

Enters: an item whose call has come to a property. Leaves: the outcome of the call, and for a
failing property the representation of each minimal example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from pytest_dcp._harness.controller import report
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.controller.warm_worlds import tear_down_survivors
from pytest_dcp._harness.lockstep import fresh_folders
from pytest_dcp._harness.lockstep.engine import Found, FoundError, run_properties
from pytest_dcp._harness.lockstep.hypothesis_settings import set_settings, settings_of
from pytest_dcp._harness.protocol.messages import Go, RunItem
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.world.outcome import Outcome
from pytest_dcp._harness.world.world import World
from pytest_dcp._pytest_internals import ExceptionRepr
from pytest_dcp.errors import WorldError

__all__ = ["ItemRanks", "FoundError", "run_properties", "longrepr_for", "without_fixture_check"]


class Item(Protocol):
    """The parts of a marked item used here."""

    item: pytest.Item
    spec: WorldSpec
    harness: Harness
    world: World | None
    limit_s: float
    checkpoint_dir: Path

    def order(self) -> RunItem:
        """The order that begins the item."""

    def note_teardown(self, torn: Outcome) -> None:
        """Record failures during the item's teardown in a world that is being replaced."""

    def expects(self, error: BaseException) -> bool:
        """Whether the test's xfail marker expects this exception."""


class ItemRanks:
    """The item's ranks, for `lockstep.engine`."""

    def __init__(self, marked: Item) -> None:
        self._marked = marked
        self.limit_s = marked.limit_s

    @property
    def world(self) -> World:
        """Where the item is running now."""
        if self._marked.world is None:
            raise WorldError("the test has no world to run an example in")
        return self._marked.world

    def renew(self) -> Outcome:
        """A new world for a broken one, where the item's call has begun."""
        marked = self._marked
        if not self.world.is_over:
            marked.note_teardown(tear_down_survivors(self.world))
        seed = marked.harness.seed_of(marked.item.nodeid)
        marked.world, began = marked.harness.open(marked.spec, seed)
        if began.kind == "passed":
            marked.world.restart_clock(marked.limit_s)
            began = marked.world.run("setup", marked.order())
        if began.kind == "passed":
            marked.world.restart_clock(marked.limit_s)
            began = marked.world.run("call", Go("call"))
        return began

    def fresh(self) -> None:
        """Renew all state that must be new for each example."""
        fresh_folders.renew(self._marked.checkpoint_dir)

    def exception_for(self, outcome: Outcome) -> BaseException:
        """The exception that represents a failed outcome in the controller."""
        return report.exception_for(outcome, self._marked.item.nodeid)

    def lead_with_unexpected(self, outcome: Outcome) -> Outcome:
        """The outcome with failures that an xfail marker does not expect on top."""
        return report.lead_with_unexpected(outcome, self._marked.expects)


@contextlib.contextmanager
def without_fixture_check(item: pytest.Item) -> Iterator[None]:
    """Keep Hypothesis' own plugin from looking at fixtures, which exist in the ranks only.

    The ranks check them. Can go when the plugin does not make fixtures in order to look at them.
    """
    test: Any = item.obj  # type: ignore[attr-defined]  # of a pytest.Function
    own = settings_of(test)
    if own is None:
        yield
        return
    from hypothesis import HealthCheck, settings

    checks = {HealthCheck.function_scoped_fixture, HealthCheck.differing_executors}
    quiet = settings(own, suppress_health_check=[*{*own.suppress_health_check, *checks}])
    set_settings(test, quiet)
    try:
        yield
    finally:
        set_settings(test, own)


def longrepr_for(
    error: FoundError, config: pytest.Config, location: tuple[str, int], rerun: str
) -> ExceptionRepr | None:
    """The representation of a property that fails: its minimal examples, the ranks' tracebacks."""
    if error.seed is not None:
        rerun = f"{rerun} --hypothesis-seed={error.seed}"
    reprs = [_represent(found, config, location, rerun) for found in error.found]
    first = reprs[0]
    if first is None:
        return None
    for number, one in enumerate(reprs[1:], start=2):
        if one is not None:
            one.sections = [part for part in one.sections if part[0] != report.RERUN]
            at = len(first.sections) - 1
            title = f"distinct failure {number} of {len(reprs)}"
            first.sections.insert(at, (title, str(one), "="))
    return first


def _represent(
    found: Found, config: pytest.Config, location: tuple[str, int], rerun: str
) -> ExceptionRepr | None:
    if found.outcome.first is None:
        return None
    longrepr = report.longrepr_for(found.outcome, found.outcome.first, config, location, rerun)
    longrepr.sections.insert(0, (EXAMPLE, "\n".join(found.notes).strip(), "-"))
    return longrepr


EXAMPLE = "minimal failing example"
