"""Starts ranks as fresh interpreters, where forking is unsafe; the same contract as the zygote's.

Slower, because each rank repeats the imports and the collection: a rank collects only the tests of
its worlds, by name, with the session's command line. Every rank is a child of the controller, in a
process group of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import (
    OWN_SIGNALS,
    RANK_VARIABLE,
    ProcessExit,
    RankFds,
    RankLaunch,
    Signals,
    StopChange,
)
from pytest_dcp._harness.protocol.messages import At, Done, Go, RunItem, RunProcess
from pytest_dcp._harness.rank import (
    captured_output,
    coverage,
    junit_state,
    session_preparation,
    this_rank,
)
from pytest_dcp._harness.rank import main as rank
from pytest_dcp._pytest_internals import forget_made_ids, make_config, redirect_writer, writer_of
from pytest_dcp.errors import DcpError
from pytest_dcp.garbage_collection import frozen_imports

PROGRAM = "from pytest_dcp._harness.launchers.spawn import main; main()"
GUARD = "from pytest_dcp._harness.launchers.orphan_guard import main; main()"
WAIT_S = 10.0
IN_OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
)
"""Of Popen: the child leads a process group of its own."""


class SpawnLauncher(Signals):
    """A `launch.Launcher` that starts interpreters."""

    name = "spawn"
    lost = ""
    first_place = "starting Python"

    def __init__(self, session: dict[str, Any]) -> None:
        self._session = session
        self._running: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
        self._news: dict[int, list[ProcessExit | StopChange]] = {}
        self._lock = threading.Lock()
        self._wake_r, self._wake_w = socket.socketpair()
        self._waiters: list[threading.Thread] = []
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, session: pytest.Session, folder: Path) -> SpawnLauncher:
        """A launcher of ranks that collect with this session's command line.

        Its ranks may keep files in `folder`.
        """
        config = session.config
        args = [str(arg) for arg in config.invocation_params.args]
        if hasattr(config.option, "no_cov"):
            # A rank's own pytest-cov would erase the others' data. After --cov it prints nothing.
            args.insert(args.index("--") if "--" in args else len(args), "--no-cov")
        return cls(
            {
                "args": args,
                "coverage": coverage.settings(folder),
                "cwd": str(config.invocation_params.dir),
                "rootdir": str(config.rootpath),
                "path": sys.path,
                "captures": config.getoption("capture") != "no",
                "workerinput": getattr(config, "workerinput", None),
            }
        )

    def await_ready(self) -> None:
        """Does nothing: an interpreter can be started at any time."""

    def check_running(self) -> None:
        """Does nothing: this process is the launcher."""

    def launch(self, orders: Sequence[RankLaunch], fds: Sequence[RankFds]) -> None:
        """Start one interpreter per order."""
        self._start_guard(orders[0].session)
        for order, rank_fds in zip(orders, fds, strict=True):
            request = {
                "order": order.to_json(),
                "fds": rank_fds.all(),
                "session": self._session,
                "parent": os.getpid(),
            }
            # Discard the output of a rank's own pytest session about itself.
            output = subprocess.DEVNULL if self._session["captures"] else None
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(request, default=repr)],
                pass_fds=rank_fds.all(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                **IN_OWN_GROUP,
                cwd=self._session["cwd"],
                env={**os.environ, **rank.environment(order)},
            )
            self._running[order.world, order.rank] = process
            waiter = threading.Thread(
                target=self._wait, args=(order, process), name="dcp-wait", daemon=True
            )
            self._waiters = [*filter(threading.Thread.is_alive, self._waiters), waiter]
            waiter.start()

    def _start_guard(self, session: str) -> None:
        """Start a process that kills the ranks' programs if this one is killed before it can."""
        if self._guard is None:
            self._guard = subprocess.Popen(
                [sys.executable, "-c", GUARD, f"{session}:"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **IN_OWN_GROUP,
            )

    def _wait(self, order: RankLaunch, process: subprocess.Popen[bytes]) -> None:
        # Look before reaping: until then the process id, and so its group's, cannot be another's.
        while (halt := self._stop_change(order.rank, process.pid)) is not None:
            self._tell(order.world, halt)
        with self._lock:
            del self._running[order.world, order.rank]
            leaked_processes, trackers = self._kill_leaked(order, process.pid)
            if not trackers:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        self._tell(order.world, ProcessExit(order.rank, status, leaked_processes))
        linux.await_trackers(trackers)
        for tracker in trackers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(tracker, signal.SIGKILL)

    def _stop_change(self, rank: int, pid: int) -> StopChange | None:
        """The next stop of the process or its end; None when the process ended, not yet reaped."""
        found = os.waitid(os.P_PID, pid, linux.ANY_CHANGE | os.WNOWAIT)
        if found is None or found.si_code not in linux.HALTS:
            return None
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
        return StopChange(rank, linux.HALTS[found.si_code])

    def _tell(self, world: int, what: ProcessExit | StopChange) -> None:
        with self._lock:
            self._news.setdefault(world, []).append(what)
        with contextlib.suppress(OSError):
            self._wake_w.send(b"x")

    def _kill_leaked(self, order: RankLaunch, pid: int) -> tuple[tuple[str, ...], list[int]]:
        """Kill the processes that a rank left behind. Returns them as `pid (command)`, and the
        resource trackers that may continue.
        """
        found, trackers = [], []
        for candidate in linux.processes():
            if candidate != pid and linux.variable_of(candidate, RANK_VARIABLE) == order.token:
                if linux.TRACKER in (command := linux.command_of(candidate)):
                    trackers.append(candidate)
                    continue
                found.append(f"{candidate} ({command})")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(candidate, signal.SIGKILL)
        return tuple(found), trackers

    def fileno(self) -> int:
        """A descriptor that is readable when a rank has ended or stopped."""
        return self._wake_r.fileno()

    def has_news(self, world: int) -> bool:
        """Whether there is news of this world."""
        return bool(self._news.get(world))

    def news(self, world: int) -> list[ProcessExit | StopChange]:
        """Ends and stops of this world's ranks since the last call."""
        while select.select([self._wake_r], [], [], 0)[0]:
            self._wake_r.recv(4096)
        with self._lock:
            return self._news.pop(world, [])

    def forget(self, world: int) -> None:
        """Drop the state of a world that has ended."""
        with self._lock:
            self._news.pop(world, None)

    def _signal(self, world: int, rank: int, signum: int) -> None:
        with self._lock:
            process = self._running.get((world, rank))
            if process is None:
                return
            with contextlib.suppress(ProcessLookupError):
                if signum in OWN_SIGNALS:
                    linux.signal_main_thread(process.pid, signum)
                elif signum == signal.SIGKILL:
                    linux.kill_group(process.pid)
                else:
                    os.killpg(process.pid, signum)

    def preload(self, modules: Sequence[str]) -> None:
        """Does nothing: every interpreter imports its own."""

    def close(self) -> None:
        """End every rank; bounded in time."""
        for world, number in list(self._running):
            self.kill(world, number)
        for waiter in self._waiters:
            waiter.join(WAIT_S)
        if self._guard is not None:
            self._guard.communicate(timeout=WAIT_S)
        self._wake_r.close()
        self._wake_w.close()


def main() -> NoReturn:
    """A spawned rank's entry: its order is the first argument."""
    request = json.loads(sys.argv[1])
    linux.die_with_parent(request["parent"])
    sys.path[:] = request["session"]["path"]
    coverage.start(request["session"]["coverage"])
    fds = RankFds(*request["fds"])
    for fd in fds.all():
        os.set_inheritable(fd, False)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    order = RankLaunch.from_json(request["order"])
    rank.run(order, fds, lambda this: _prepare(this, request["session"]))


def _prepare(one: this_rank.Rank, session: dict[str, Any]) -> _CollectingRunner:
    """Import the modules needed to join the process group, before the clock starts."""
    one.channel.send(At("preparing", "importing torch"))
    # An import that fails here fails again later, where it is reported.
    with contextlib.suppress(Exception), frozen_imports():
        importlib.import_module("torch.distributed")
    one.channel.send(At("ready"))
    return _CollectingRunner(one, session)


class _CollectingRunner:
    """Runs items by collecting them first, one pytest session per item."""

    def __init__(self, one: this_rank.Rank, session: dict[str, Any]) -> None:
        self.rank = one
        self.session = session
        if session["captures"]:
            one.capture = lambda: _capture_output(one.fds)

    def run(self, order: RunItem) -> None:
        """Collect the item, then run it as a forked rank does."""
        self.rank.channel.send(At("preparing", "collecting the test"))
        os.chdir(self.session["cwd"])
        config = make_config(list(self.session["args"]))
        _reset_session_options(config, self.rank.order.basetemp)
        if self.session["workerinput"] is not None:  # for xdist's fixtures, such as `worker_id`
            config.workerinput, config.workeroutput = self.session["workerinput"], {}
        config.args = [os.path.join(self.session["rootdir"], order.nodeid)]
        serving = _ServingPlugin(self.rank, order)
        config.pluginmanager.register(serving, "pytest_dcp.serving")
        config.pluginmanager.register(captured_output.CStreams(), captured_output.C_STREAMS)
        capture = self.rank.capture
        try:
            serving.run(config)
        finally:
            self.rank.capture = capture  # the session's own has ended with it

    def run_process(self, order: RunProcess) -> Done:
        """Refused: a test's processes are only forked; otherwise they are left to the test."""
        raise DcpError(f"told to run a process of {order.nodeid!r} in a new interpreter")

    def tear_down(self, order: Go) -> Done:
        """Does nothing: the session of an item has torn down everything that it had set up."""
        return Done("teardown", "passed", time.monotonic())


@contextlib.contextmanager
def _capture_output(fds: RankFds) -> Iterator[list[tuple[str, str, str]]]:
    """Have standard output and error written to the memfds; yields sections to fill."""
    sections: list[tuple[str, str, str]] = []
    saved = {1: os.dup(1), 2: os.dup(2)}
    os.dup2(fds.out, 1)
    os.dup2(fds.err, 2)
    try:
        yield sections
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, fd, name in ((1, fds.out, "stdout"), (2, fds.err, "stderr")):
            os.dup2(saved[target], target)
            os.close(saved[target])
            text = os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
            os.lseek(fd, 0, os.SEEK_SET)
            os.ftruncate(fd, 0)
            if text:
                sections.append(("call", name, captured_output.clip(text)))


def _reset_session_options(config: pytest.Config, basetemp: str) -> None:
    """Undo options that distribute, repeat or report: this session is one rank's."""
    if getattr(config.option, "xmlpath", None):
        config.stash[junit_state.FAMILY_KEY] = config.getini("junit_family")
    for name, value in (
        ("numprocesses", None), ("dist", "no"), ("tx", []), ("looponfail", False),
        ("basetemp", basetemp), ("xmlpath", None), ("lf", False), ("failedfirst", False),
        ("newfirst", False), ("cacheclear", False), ("stepwise", False), ("stepwise_skip", False),
        ("stepwise_reset", False), ("maxfail", 0), ("deselect", None),
    ):  # fmt: skip
        if hasattr(config.option, name):
            setattr(config.option, name, value)


class _ServingPlugin:
    """Takes over a spawned rank's session after its collection."""

    def __init__(self, one: this_rank.Rank, order: RunItem) -> None:
        self.rank = one
        self.order = order
        self._served = False
        self._error: BaseException | None = None
        self._not_collected: list[str] = []
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115 - for the life of the session
        self._writer: Any = None
        self._file: Any = None

    def run(self, config: pytest.Config) -> None:
        """The session. Raises the exception of the item's run, which pytest would only print."""
        missing = ""
        try:
            config.hook.pytest_cmdline_main(config=config)
        except pytest.UsageError as exc:
            missing = str(exc)
        if self._error is not None:
            raise self._error
        if not self._served:
            reasons = "\n".join([missing, *self._not_collected])
            raise DcpError(f"this rank did not collect {self.order.nodeid!r}: {reasons}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Leave the caches to the controller, and print nothing of a session of one test."""
        manager = session.config.pluginmanager
        for name in ("lfplugin", "nfplugin"):
            manager.unregister(name=name)
        self._writer, self._file = writer_of(session.config)
        self._print_to(self._nowhere)

    def _print_to(self, file: Any) -> None:
        redirect_writer(self._writer, file)

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Recreate ids in a warm rank, which collects its modules once for each test."""
        for mark in metafunc.definition.iter_markers("parametrize"):
            forget_made_ids(mark)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep collection errors, for `run` to raise."""
        if report.failed:
            self._not_collected.append(report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run the one item in the controller's lockstep."""
        self._served = True
        self._print_to(self._file)
        try:
            plugin = session_preparation.prepare(session, tty="/dev/tty")
            runner = session_preparation.enlist(self.rank, plugin)
            self.rank.channel.send(At("ready"))
            runner.run(RunItem(-1, self.order.nodeid, self.order.seed, self.order.checkpoint_dir))
        except BaseException as exc:  # noqa: BLE001 - `run` raises it
            self._error = exc
        self._print_to(self._nowhere)
        return True
