"""pytest's hooks in a process that an outer launcher has started.

Enters: the launcher's variables. Leaves: outer rank 0 is the controller, the others are seats; both
only if a test needs a world. Otherwise every process runs its own session, as without this plugin.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Generator
from typing import Any, NoReturn, TextIO

import pytest

from pytest_dcp._harness.controller import collection
from pytest_dcp._harness.controller.decided_markers import markers_of
from pytest_dcp._harness.controller.options import Options
from pytest_dcp._harness.controller.session import Harness
from pytest_dcp._harness.outer.environment import (
    OuterEnvironmentError,
    OuterLaunch,
    read_environment,
)
from pytest_dcp._harness.outer.meeting import machine_name, process_name
from pytest_dcp._harness.outer.seat_link import SeatLink
from pytest_dcp._harness.outer.seat_messages import CONTROLLER_LOST_CODE, SeatJoin
from pytest_dcp._harness.outer.termination import TERMINATION
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._pytest_internals import redirect_writer, writer_of
from pytest_dcp.errors import WorldError

PROBLEM_CHARS = 4000


def register(config: pytest.Config, options: Options) -> OuterPlugin | None:
    """Register the plugin if a launcher has started this process; problems wait for a marked
    test.
    """
    launch, problem = None, ""
    try:
        launch = read_environment(os.environ)
    except OuterEnvironmentError as error:
        problem = str(error)
    if launch is None and not problem:
        return None
    is_worker = hasattr(config, "workerinput")
    if config.getoption("dist", "no") != "no" and not is_worker:
        return None  # xdist's workers collect the tests, and say this
    if is_worker and launch is not None:
        problem = problem or (
            f"pytest-xdist's -n cannot be used under {launch.launcher}, which has started "
            f"{launch.size} processes already: leave -n out"
        )
    if options.adopt and launch is not None:
        problem = problem or (
            f"--dcp-adopt starts the processes of each test itself, but {launch.launcher} has "
            f"started {launch.size} already: leave out one of the two"
        )
    plugin = OuterPlugin(config, options, launch, problem)
    config.pluginmanager.register(plugin, "pytest_dcp.outer")
    return plugin


class OuterPlugin:
    """The plugin of one session."""

    def __init__(
        self, config: pytest.Config, options: Options, launch: OuterLaunch | None, problem: str
    ) -> None:
        self.config = config
        self.launch = launch
        self.is_active = False
        """Whether the session has tests that need worlds."""
        self._options = options
        self._problem = problem
        self._session: pytest.Session | None = None
        self._harness: Any = None
        self._code: int | None = None
        self._link: SeatLink | None = None
        self._too_large: list[tuple[pytest.Item, WorldSpec]] = []
        self._tests: tuple[tuple[str, str], ...] = ()
        self._needs_gpus = False
        self._errors: list[tuple[str, str]] = []
        """Of the collection: nodeid and text."""
        self._writer: Any = None
        self._terminal: TextIO | None = None
        self._unprinted = io.StringIO()

    @property
    def is_seat(self) -> bool:
        """Whether this process only starts ranks for the controller."""
        return self.is_active and self.launch is not None and self.launch.rank > 0

    def make_harness(self, session: pytest.Session, options: Options) -> Harness:
        """The controller's harness."""
        from pytest_dcp._harness.outer.controller_session import OuterHarness

        if self.launch is None:
            raise WorldError("no launcher has started this process")
        self._harness = OuterHarness(session, options, self.launch, self._make_join)
        TERMINATION.install(self._end_session)
        return self._harness  # type: ignore[no-any-return]  # as just made

    def _end_session(self, signum: int, frame: object) -> NoReturn:
        launch = self.launch
        lost = [f"; rank {rank}: {how}" for rank, how in self._harness.lost_seats().items()]
        name = launch.launcher if launch is not None else "a launcher"
        raise pytest.exit.Exception(
            f"{name} or a user ended this session with SIGTERM{''.join(lost)}",
            returncode=pytest.ExitCode.INTERRUPTED,
        )

    def _make_join(self, token: str, sees_folder: bool = True) -> SeatJoin:
        if self.launch is None:
            raise WorldError("no launcher has started this process")
        machine = machine_name()
        return SeatJoin(
            token=token,
            rank=self.launch.rank,
            node=self.launch.node or machine,
            machine=machine,
            name=process_name(),
            tests=self._tests,
            problem="\n".join(text for _, text in self._errors)[:PROBLEM_CHARS],
            sees_folder=sees_folder,
            gpus=_count_gpus() if self._needs_gpus else 0,
        )

    # Hooks: silence.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> Generator[None, object, object]:
        """Print nothing from here on, unless this session turns out to be an ordinary one."""
        self._session = session
        if self.launch is not None and self.launch.rank > 0 and not self._problem:
            self._writer, self._terminal = writer_of(self.config)
            redirect_writer(self._writer, self._unprinted)
        return (yield)

    def _print_all(self) -> None:
        """Print what was held back, and go on printing."""
        if self._writer is not None and self._terminal is not None:
            redirect_writer(self._writer, self._terminal)
            self._terminal.write(self._unprinted.getvalue())
            self._writer = None

    # Hooks: collection.

    def pytest_report_header(self) -> str | None:
        """Name the launcher."""
        if self.launch is None:
            return None
        launch = self.launch
        return f"pytest_dcp: rank {launch.rank} of the {launch.size} of {launch.launcher}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the errors of the collection, for the controller to compare."""
        if report.failed:
            self._errors.append((report.nodeid, report.longreprtext))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Refuse wrong variables; deselect the tests that need more ranks than there are."""
        marker = self._options.marker
        needs_worlds = any(markers_of(item, marker) or _uses_worlds(item) for item in session.items)
        if self._problem and self._options.adopt and session.items:
            self._refuse()
        if needs_worlds:
            if self._problem:
                self._refuse()
            self.is_active = self.launch is not None
            self._deselect(session)
        return (yield)

    def _refuse(self) -> NoReturn:
        if (output := getattr(self.config, "workeroutput", None)) is not None:
            output[collection.USAGE_ERROR] = self._problem
        raise pytest.UsageError(self._problem)

    def _deselect(self, session: pytest.Session) -> None:
        size = self.launch.size if self.launch is not None else 0
        tests, fitting = [(nodeid, "an error at collection") for nodeid, _ in self._errors], []
        for item in session.items:
            spec, _ = collection.spec_of(item, self._options)
            tests.append((item.nodeid, _describe(spec)))
            self._needs_gpus |= spec is not None and spec.device == "cuda"
            if spec is not None and spec.size > size:
                self._too_large.append((item, spec))
            else:
                fitting.append(item)
        self._tests = tuple(tests)
        if self._too_large:
            session.items[:] = fitting
            self.config.hook.pytest_deselected(items=[item for item, _ in self._too_large])

    def pytest_report_collectionfinish(self) -> str | None:
        """Say why tests were deselected."""
        if not self._too_large or self.launch is None:
            return None
        count, most = len(self._too_large), max(spec.size for _, spec in self._too_large)
        tests = "1 test needs" if count == 1 else f"{count} tests need"
        return (
            f"pytest_dcp: {tests} more ranks than the {self.launch.size} of "
            f"{self.launch.launcher}, up to {most}: deselected"
        )

    # Hooks: the seat's life, and the session's end.

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Serve the controller instead of running tests."""
        if session.config.option.collectonly or not self.is_seat or self.launch is None:
            if not self.is_active:
                self._print_all()
            return None
        from pytest_dcp._harness.outer.seat import ControllerLostError
        from pytest_dcp._harness.outer.seat_session import serve_seat

        try:
            self._code, self._link = serve_seat(
                session, self._options, self.launch, self._make_join
            )
        except ControllerLostError:
            self._code = CONTROLLER_LOST_CODE
            if self.launch.rank == 1:
                _say(
                    f"rank 0 of {self.launch.launcher} is gone or unreachable: the tests that it "
                    "had not reported have no result"
                )
        except WorldError as error:
            raise pytest.UsageError(str(error)) from error
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A seat ends as the controller says."""
        if self._code is not None:
            session.exitstatus = self._code

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """The controller's report is written: release the seats, and let the controller end
        first.
        """
        code = int(self._session.exitstatus) if self._session is not None else 0
        if self._harness is not None:
            TERMINATION.remove()
            self._harness.conclude(code)
        elif self._link is not None:
            from pytest_dcp._harness.outer.seat_session import await_controllers_end

            await_controllers_end(self._link, code)
        elif self._code is None and code not in (0, pytest.ExitCode.USAGE_ERROR):
            self._print_all()


def _uses_worlds(item: pytest.Item) -> bool:
    return "worlds" in getattr(item, "fixturenames", ())


def _describe(spec: WorldSpec | None) -> str:
    if spec is None:
        return ""
    return f"a world of {spec.size} ({spec.backend}, {spec.device}, mesh {spec.mesh})"


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _say(text: str) -> None:
    if sys.__stderr__ is not None:
        sys.__stderr__.write(f"pytest_dcp: {text}\n")
