"""Forwards pytest's hooks to marked items; registered only in sessions that have some.

Enters: hooks of pytest, its plugins, and Hypothesis'. Leaves: calls of the `MarkedItem`s.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_dcp._harness.controller.item_report import amend_report
from pytest_dcp._harness.controller.marked_item import ITEM_KEY, MarkedItem, module_of
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.controller.warm_worlds import SESSION_ENDS
from pytest_dcp._harness.rank.log_capture import SteadyLogs


class ItemHooks:
    """The plugin."""

    def __init__(self, harness: Harness, pdb_invoke: Any, steady_logs: SteadyLogs) -> None:
        self._harness = harness
        self._steady_logs = steady_logs
        self._warm = harness.warm
        self._pdb_invoke = pdb_invoke
        """pytest's own plugin of --pdb, None without it; a marked test's debugger is in a rank."""

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        """--pdb for failures that are not a rank's."""
        marked = node.stash.get(ITEM_KEY, None)
        is_from_ranks = marked is not None and call.excinfo.value is marked.raised
        if self._pdb_invoke is not None and not is_from_ranks:
            self._pdb_invoke.pytest_exception_interact(node=node, call=call, report=report)

    def pytest_internalerror(self, excinfo: Any) -> None:
        """--pdb for pytest's own errors, as its plugin has it."""
        if self._pdb_invoke is not None:
            self._pdb_invoke.pytest_internalerror(excinfo)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Look after the idle worlds before and after each item; notify a marked item of its start.

        After it, end the session if a rank has.
        """
        self._warm.check()
        marked = item.stash.get(ITEM_KEY, None)
        if marked is not None or "worlds" in getattr(item, "fixturenames", ()):
            self._harness.prepare_launcher()
        if marked is None:
            result: object = yield
        else:
            marked.begin()
            try:
                with self._steady_logs.during_an_item():
                    result = yield
            except SESSION_ENDS:
                self._end_cut_off(marked)
                raise
            finally:
                if nextitem is None or ITEM_KEY not in nextitem.stash:
                    self._steady_logs.take_off()
        module = module_of(nextitem) if nextitem is not None else None
        self._warm.end_all(but_module=None if self._harness.is_ending else module)
        self._harness.check_end()
        return result

    def _end_cut_off(self, marked: MarkedItem) -> None:
        """Have the item's ranks tear down; an interrupt meanwhile kills the idle ones, too."""
        if marked.world is not None and marked.world.is_over:  # by a second interrupt
            self._warm.kill_all()
        try:
            marked.end_cut_off()
        except BaseException:
            self._warm.kill_all()
            raise

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Pass the next item to a marked item; None if the session stops."""
        if (marked := item.stash.get(ITEM_KEY, None)) is not None:
            marked.begin_teardown(nextitem)
        return (yield)

    def pytest_sessionfinish(self) -> None:
        """Take the log handlers off if no test was known to be the last, as with -x."""
        self._steady_logs.take_off()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Hypothesis' plugin must not look for fixtures in this process."""
        if ITEM_KEY not in item.stash or "hypothesis" not in sys.modules:
            return (yield)
        from pytest_dcp._harness.controller import property_item

        with property_item.without_fixture_check(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show the ranks' failure, not the controller's."""
        rep = yield
        if (marked := item.stash.get(ITEM_KEY, None)) is not None:
            amend_report(marked, call, rep)
        return rep

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> bool | None:
        """pytest-timeout's limit becomes the world's."""
        if (marked := item.stash.get(ITEM_KEY, None)) is None:
            return None
        marked.limit(settings.timeout)
        return True
