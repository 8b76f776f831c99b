"""`pytest --dcp-adopt`: processes that unmodified tests start run as ranks.

A suite that starts its ranks itself pays seconds for each test: every rank is a new interpreter
that imports torch. Their errors are lost: only an exit code comes back, and often only that
of rank 0 is compared. Here each process of a test is forked from the zygote, as ranks are, and its
verdict counts. The suite's own code runs unchanged in both places:

    in pytest's process      the test's `setUp`, its call, its `tearDown`; `Process.start`, `join`
    in a rank                the function that was to run in the process, with its arguments

`Process.start()` is where the two meet (`process_hooks`): its `_Popen` is ours, and gives a
`RankPopen` instead of a new interpreter. Where a suite says how many processes it starts, they are
the ranks of one world (`process_set`): `mp.spawn`, torch's `MultiProcessTestCase` (`torch_cases`)
and `MultiProcContinuousTest` (`continuous_cases`). Processes that start one by one are worlds of
one rank each, and are reported together.

The rules:

- A failure that the test raises, asserts or looks at (`exitcode`) is the test's business. Every
  other failure of a process fails the test when its call ends.
- Processes meet at files and ports of their own, begin with the environment and the folder of
  pytest's process, and end within the test's time limit.
- A process that cannot be adopted runs as it is written; a warning names it and why.

Only forked ranks are adopted: where ranks must be spawned, the tests run as they are written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_dcp._harness.adoption import process_hooks
from pytest_dcp._harness.adoption.choice import MARKER, is_chosen, marker_problem
from pytest_dcp._harness.adoption.replacements import Replacements
from pytest_dcp._harness.adoption.running_test import RunningTest
from pytest_dcp._harness.controller.collection import refuse_suite, tell
from pytest_dcp._harness.controller.marked_item import ITEM_KEY
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp.errors import UnsupportedVersionError

NAME = "pytest_dcp.adoption"
TORCH_CLASSES = "torch.testing._internal.common_distributed"
TORCH_SPAWN = "torch.multiprocessing.spawn"


def begin(harness: Harness) -> None:
    """Adopt the tests of this session.

    Raises `pytest.UsageError` for markers that cannot be read, and for an unknown torch.
    """
    problems = [
        f"{item.nodeid}: {problem}"
        for item in harness.session.items
        for mark in item.iter_markers(MARKER)
        if (problem := marker_problem(mark))
    ]
    if problems:
        refuse_suite(harness.config, problems)
    if harness.launcher().name != "fork":
        name = harness.launcher().name
        tell(harness.config, f"pytest_dcp: no test is adopted: ranks come by {name}, not by fork")
        return
    adoption = Adoption(harness)
    try:
        adoption.replace_functions()
    except UnsupportedVersionError as error:
        raise pytest.UsageError(f"--dcp-adopt: {error}") from None
    harness.config.pluginmanager.register(adoption, NAME)


class Adoption:
    """The plugin."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._replacements = Replacements()
        self._test: RunningTest | None = None
        self._pid = os.getpid()
        self._index = {item: index for index, item in enumerate(harness.session.items)}

    def current(self) -> RunningTest | None:
        """The adopted test that runs now; None in a process that was forked from this one."""
        return self._test if os.getpid() == self._pid else None

    def replace_functions(self) -> None:
        """Replace the functions that start and join processes, in modules that are imported."""
        replace = self._replacements
        if not self._replacements.has_replaced(*process_hooks.POINT):
            process_hooks.install(replace, self.current)
        if TORCH_CLASSES not in sys.modules:
            self._replace_spawn()
            return
        from pytest_dcp._torch_internals import foreign_tests

        if replace.has_replaced(*foreign_tests.START_CASE):
            return
        self._replace_spawn()
        from pytest_dcp._harness.adoption import continuous_cases, torch_cases

        for point, make in (
            (foreign_tests.START_CASE, torch_cases.start_hook),
            (foreign_tests.START_CONTINUOUS, continuous_cases.start_hook),
        ):
            original = vars(point[0])[point[1]]
            replace.replace(*point, make(getattr(original, "__func__", original), self.current))
        original = vars(foreign_tests.JOIN_CASE[0])[foreign_tests.JOIN_CASE[1]]
        replace.replace(*foreign_tests.JOIN_CASE, torch_cases.join_hook(original))

    def _replace_spawn(self) -> None:
        """`mp.spawn`."""
        spawn: Any = sys.modules.get(TORCH_SPAWN)
        replace = self._replacements
        if spawn is None or replace.has_replaced(spawn, "start_processes"):
            return
        hook = process_hooks.spawn_hook(spawn.start_processes, self.current)
        for owner in (spawn, sys.modules["torch.multiprocessing"]):
            replace.replace(owner, "start_processes", hook)
        join = process_hooks.join_hook(vars(spawn.ProcessContext)["join"])
        replace.replace(spawn.ProcessContext, "join", join)

    # Hooks.

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """The test's processes are ours, from its setup to its teardown."""
        index = self._index.get(item)
        is_marked = ITEM_KEY in item.stash
        if is_marked or index is None or not is_chosen(item, self._harness.options.adopt_except):
            return (yield)
        self._harness.prepare_launcher()
        self.replace_functions()
        self._test = test = RunningTest(item, index, self._harness)
        try:
            return (yield)
        finally:
            self._test = None
            test.end()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """The test passes only if its processes do."""
        __tracebackhide__ = True
        test = self._test
        if test is None or test.item is not item:
            return (yield)
        try:
            result: object = yield
        except BaseException:
            test.conclude_call(has_failed=True)
            raise
        test.conclude_call(has_failed=False)
        return result

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Show the ranks' own failure instead of the controller's."""
        rep = yield
        if self._test is not None and self._test.item is item:
            self._test.failures.amend_report(call, rep)
        return rep

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> None:
        """Processes end a little before pytest-timeout ends the test, which goes on counting."""
        if self._test is not None and self._test.item is item:
            self._test.limit(settings.timeout)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Leave Python and torch as they were."""
        process_hooks.end_sharing()
        self._replacements.restore()
