"""A pytest item inside a rank: its own setup, call and teardown, by pytest's own runner.

Enters: the collected session that the rank inherited. Leaves: one `Done` for each phase, in
lockstep with the other ranks: after each phase the rank waits for the controller's word.

`session_preparation` readies the session. Whether an xfail marker makes a failure expected is
decided once, by the controller.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import warnings
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_dcp._harness.protocol.launcher import is_worth_preloading
from pytest_dcp._harness.protocol.messages import (
    Done,
    Go,
    Phase,
    RecordedWarning,
    RunItem,
    RunProcess,
    SubReport,
)
from pytest_dcp._harness.rank import carried_state
from pytest_dcp._harness.rank.captured_output import capture_sections, clip
from pytest_dcp._harness.rank.debugger import RankDebugger
from pytest_dcp._harness.rank.phase_verdict import PhaseVerdicts
from pytest_dcp._harness.rank.process_state import UNTOLD
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp._pytest_internals import (
    begin_request,
    catch_warnings_for_item,
    end_request,
    fixtures_of,
    setup_state,
    widen_parametrised_fixture,
)
from pytest_dcp.errors import DcpError

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.foreign_process import ForeignProcess
    from pytest_dcp._harness.rank.state_keeper import StateKeeper


class RankPlugin:
    """pytest's view of a rank: runs items in phases and receives the session's hooks."""

    rank: Rank
    keeper: StateKeeper | None = None
    """In a warm world."""
    follows = False
    """Whether Hypothesis' properties run in lockstep."""
    _process: ForeignProcess | None = None
    """The process of an unmodified test, while it runs."""
    _called: Done
    _torn_down: Done
    _item: pytest.Item

    def __init__(self, session: pytest.Session, debugger: RankDebugger) -> None:
        self._debugger = debugger
        self.session = session
        self.config = session.config
        self.warnings: list[RecordedWarning] = []
        self._carried = b""
        """Data gathered by plugins, for the answer to teardown."""
        self._verdicts = PhaseVerdicts(self.config, debugger)

    def join(self, rank: Rank) -> None:
        """This process is that rank from here on."""
        self.rank = rank
        self._debugger.join(rank)
        self._verdicts.join(rank)

    # Items.

    def run(self, order: RunItem) -> None:
        """One item from setup to teardown.

        The session's reports on the whole item (its warnings) come after pytest's protocol, so the
        answer to teardown waits for that.
        """
        item = self._find(order.index, order.nodeid)
        if item is None:
            raise DcpError(f"{order.nodeid!r} is not among the items that this rank collected")
        self.warnings = []
        if order.location is not None:
            vars(item)["location"] = order.location  # a cached property; every report asks for it
        _widen_world_size(item)
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        self.rank.channel.send(self._conclude_item(self._torn_down))

    def run_process(self, order: RunProcess) -> Done:
        """A process of an unmodified test, as the call of the test that started it."""
        from pytest_dcp._harness.rank.foreign_process import ForeignProcess

        item = self._find(order.index, order.nodeid)
        if item is None:
            raise DcpError(f"{order.nodeid!r} is not among the items that this rank inherited")
        self.warnings = []
        self._process = process = ForeignProcess(order.payload, self.rank.order)
        item.runtest = process.run  # type: ignore[method-assign]  # this item only, not its class
        try:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        finally:
            self._process = None
        return replace(self._conclude_item(self._called), returncode=process.exit_code)

    def tear_down(self, order: Go) -> Done:
        """Between two items, tear down the scopes that the order's item does not share; all if
        there is none.

        The verdict is given as one of the teardown of the item that ran last.
        """
        item = self._item
        nextitem = self._find(order.next_index, order.next_nodeid)
        if self.keeper is not None:
            self.keeper.open()
        self.warnings = []
        self._verdicts.begin_phase(item)
        with self.capturing() as sections, self._recording_warnings(item):
            call = pytest.CallInfo.from_call(
                lambda: self._tear_down_to(nextitem), when="teardown", reraise=None
            )
        result = self._verdicts.judge(item, "teardown", call)
        printed = tuple(("teardown", name, text) for _, name, text in sections)
        result = replace(result, sections=(*result.sections, *printed))
        return self._conclude_item(result)

    def _tear_down_to(self, nextitem: pytest.Item | None) -> None:
        try:
            setup_state(self.session).teardown_exact(nextitem)
        finally:
            self._carried = carried_state.collect(self._item)

    def _recording_warnings(self, item: pytest.Item) -> contextlib.AbstractContextManager[None]:
        """As pytest does around each item, by the filters that are set for this one."""
        return catch_warnings_for_item(
            config=self.config, ihook=item.ihook, when="runtest", item=item
        )

    def _find(self, index: int, nodeid: str) -> pytest.Item | None:
        items = self.session.items
        # A plugin may have reordered the controller's items since.
        if 0 <= index < len(items) and items[index].nodeid == nodeid:
            return items[index]
        return next((item for item in items if item.nodeid == nodeid), None)

    def _conclude_item(self, result: Done) -> Done:
        """The answer to teardown, with what is known of the whole item."""
        # Only the new names are looked at: touching an object here copies its page.
        new = itertools.islice(reversed(sys.modules), len(sys.modules) - self.rank.modules)
        imported = [name for name in new if is_worth_preloading(name)]
        imported.reverse()
        return replace(
            result,
            warnings=tuple(self.warnings),
            imported=tuple(imported),
            reusable=not self._lasting_changes() and _process_group_is_ours(self.rank),
            changed=tuple(name for name in self._lasting_changes() if name not in UNTOLD),
            payload=self._carried,
        )

    def _lasting_changes(self) -> tuple[str, ...]:
        """Permanent changes by the item."""
        return self.keeper.leftovers if self.keeper is not None else ()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[tuple[str, str, str]]]:
        """For `Rank.capture`."""
        with capture_sections(self.config) as sections:
            try:
                yield sections
            finally:
                self._debugger.give_back()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """The item's phases, each when the controller says so."""
        self._item = item
        self._verdicts.begin_item()
        if self._process is not None:
            self._pass_setup(item)
            self._called = self._phase(item, "call")
            return True
        begin_request(item)
        self.rank.channel.send(self._phase(item, "setup"))
        while True:
            go = self.rank.channel.receive_order()
            if not isinstance(go, Go):
                raise DcpError(f"expected a phase of {item.nodeid!r}, received {go!r}")
            if go.phase == "teardown":
                nextitem = self._find(go.next_index, go.next_nodeid)
                self._torn_down = self._phase(item, "teardown", nextitem=nextitem)
                break
            result = self._phase(item, go.phase)
            if not self.rank.channel.has_order:  # else the call was given up: no one waits for it
                self.rank.channel.send(result)
        end_request(item)
        return True

    def _pass_setup(self, item: pytest.Item) -> None:
        """Tell the plugins of a setup that some expect before a call, and set up nothing.

        pytest's own logging begins its records there, pytest-rerunfailures those of reports.
        """
        manager = self.config.pluginmanager
        logging_plugin = manager.getplugin("logging-plugin")
        others = [plugin for plugin in manager.get_plugins() if plugin is not logging_plugin]
        begin = manager.subset_hook_caller("pytest_runtest_setup", others)
        call = pytest.CallInfo.from_call(lambda: begin(item=item), when="setup")
        item.ihook.pytest_runtest_makereport(item=item, call=call)

    def _phase(self, item: pytest.Item, phase: Phase, **kwargs: object) -> Done:
        hook = getattr(item.ihook, f"pytest_runtest_{phase}")
        self._verdicts.begin_phase(item)

        def run_phase() -> None:
            __tracebackhide__ = True
            with self.rank.interrupts.heard():
                hook(item=item, **kwargs)

        call = pytest.CallInfo.from_call(
            run_phase,
            when=phase,  # type: ignore[arg-type]  # the three phases of an item are pytest's own
            reraise=None,
        )
        return self._verdicts.judge(item, phase, call)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """In a world of threads, call the test in all of them."""
        __tracebackhide__ = True
        order = self.rank.order
        if not order.threads:
            return None
        from pytest_dcp._harness.rank.threaded_world import call_in_threads

        names = fixtures_of(pyfuncitem).argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        call_in_threads(order, pyfuncitem.obj, arguments)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, object, object]:
        """Drop a mesh of a process group that an earlier test has replaced."""
        mesh = self.rank.mesh
        if mesh is not None and not _is_default_group(mesh.group):
            self.rank.mesh = None
            mesh.forget()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Collect the data that plugins carry to the controller.

        Fails the test when an event requested of the world's fixture did not happen.
        """
        self._carried = b""
        try:
            return (yield)
        finally:
            self._carried = carried_state.collect(item)
            if missed := [text for unmet in self.rank.unmet for text in unmet()]:
                pytest.fail("\n".join(missed), pytrace=False)

    # Examples of a property; see `example_runner`.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Know whose examples are run, and check the fixtures of a property."""
        __tracebackhide__ = True
        if self.follows and hasattr(item, "obj") and hasattr(item.obj, "hypothesis"):
            from pytest_dcp._harness.rank import example_runner

            example_runner.check_fixtures(item)
        return (yield)

    def variant(self) -> bytes:
        """Distinguishes the running test from its parametrised siblings."""
        return self._item.nodeid.encode() if hasattr(self._item, "callspec") else b""

    def begin_example(self) -> None:
        """Forget output and logs of earlier examples."""
        self._take_printed()

    def report_example(self, error: BaseException, result: Done) -> Done:
        """The answer to an example, with pytest's own report of its failure."""

        def fail() -> None:
            __tracebackhide__ = True
            raise error

        call = pytest.CallInfo.from_call(fail, when="call", reraise=None)
        verdict = self._verdicts.judge(self._item, "call", call)
        return replace(
            verdict, at_s=result.at_s, payload=result.payload, sections=self._take_printed()
        )

    def _take_printed(self) -> tuple[tuple[str, str, str], ...]:
        """Output captured since the last time, which pytest then will not show."""
        manager: Any = self.config.pluginmanager.getplugin("capturemanager")
        out, err = manager.read_global_capture() if manager is not None else ("", "")
        handler: Any = getattr(
            self.config.pluginmanager.getplugin("logging-plugin"), "report_handler", None
        )
        log = handler.stream.getvalue() if handler is not None else ""
        if handler is not None:
            handler.reset()
        parts = (("log", log), ("stdout", out), ("stderr", err))
        return tuple(("call", name, clip(text)) for name, text in parts if text)

    # Other hooks of the session.

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Only subtests log in a rank: their reports go to the controller."""
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        data["keywords"] = {}
        self.rank.channel.send(SubReport(data))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        """Kept for the answer to teardown: the controller warns again, once for all ranks."""
        category = warning_message.category
        self.warnings.append(
            {
                "text": str(warning_message.message),
                "category": (category.__module__, category.__qualname__),
                "filename": warning_message.filename,
                "lineno": warning_message.lineno,
            }
        )

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self) -> bool:
        """pytest-timeout's limit is the controller's business."""
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_cancel_timer(self) -> bool:
        """See `pytest_timeout_set_timer`."""
        return True


def _widen_world_size(item: pytest.Item) -> None:
    """Let fixtures of any scope use a `world_size` that is parametrised.

    pytest gives the values of a parametrization the scope of a function; but in this process the
    size never changes.
    """
    callspec: Any = getattr(item, "callspec", None)
    if callspec is not None and "world_size" in callspec.params:
        definition = fixtures_of(item).name2fixturedefs["world_size"][-1]
        widen_parametrised_fixture(definition, callspec, "world_size")


def _is_default_group(group: object) -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and group is dist.group.WORLD


def _process_group_is_ours(rank: Rank) -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() == rank.order.view[1]
