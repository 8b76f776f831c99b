"""The controller's handle on the zygote, the preloaded process that ranks are forked from.

It forks the zygote once, sends it requests, and reads its reports of ranks that ended or stopped.
See `zygote` for the process itself, and for the messages between the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pytest_dcp._harness.launchers import orphan_guard
from pytest_dcp._harness.launchers.zygote import CLOSE_S, MESSAGE_BYTES, RankMain, Zygote
from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import (
    LauncherLostError,
    ProcessExit,
    RankFds,
    RankLaunch,
    Signals,
    StopChange,
)
from pytest_dcp._harness.protocol.places import PREPARE_S

SEND_S = 60.0
"""Time for the zygote to accept an order: while it imports, many fit in the socket's buffer."""


class ZygoteLauncher(Signals):
    """The controller's side: a `launcher.Launcher` that has ranks forked."""

    name = "fork"
    first_place = ""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self._control = control
        self._pid = pid
        self._owner = os.getpid()
        self._news: dict[int, list[ProcessExit | StopChange]] = {}
        self._preloaded: set[str] = set()
        self._importing = "torch"
        """The module that it is importing, by its last report."""
        self._unready = 1
        """Number of import requests that it has not yet confirmed."""
        self._session = ""
        self._files: dict[int, list[orphan_guard.File]] = {}
        """By world, the files that its ranks keep open as long as they live."""
        self.lost = ""

    @classmethod
    def start(
        cls,
        prepare: Callable[[], RankMain],
        *,
        modules: Sequence[str],
        detach: bool,
    ) -> ZygoteLauncher:
        """Fork the zygote of this process.

        It imports `modules` before the first rank is forked. `prepare` runs once in it and returns
        the function that runs in every rank. `detach` drops the inherited pipes and sockets, which
        belong to xdist.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        linux.pause_openmp()
        sys.stdout.flush()
        sys.stderr.flush()
        linux.flush_c_streams()
        with warnings.catch_warnings():
            # Python 3.12 warns about any thread; `plugin` has looked at them, and xdist's is safe.
            warnings.simplefilter("ignore", DeprecationWarning)
            parent = os.getpid()
            pid = os.fork()
        if pid == 0:
            ours.close()
            run_zygote(parent, lambda: Zygote(theirs, prepare, modules), detach=detach)
        theirs.close()
        ours.settimeout(SEND_S)
        return cls(ours, pid)

    def await_ready(self) -> None:
        """Wait until the zygote has done its imports, so that it forks at once."""
        deadline = time.monotonic() + PREPARE_S
        self.check_running()
        while self._unready or self.lost:
            if self.lost:
                raise self._lost_error()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise self._lost_error(f"still imported {self._importing} after {PREPARE_S:g} s")
            select.select([self._control], [], [], left_s)
            self._read()

    def check_running(self) -> None:
        """Raise `LauncherLostError` if a test has stopped the zygote, which nothing continues."""
        if not self.lost and linux.state_of(self._pid) == "T":
            raise self._lost_error("was stopped by a signal; it was killed")

    def launch(self, orders: Sequence[RankLaunch], fds: Sequence[RankFds]) -> None:
        """Have one process forked per order."""
        for order, rank_fds in zip(orders, fds, strict=True):
            self._session = order.session
            self._news.setdefault(order.world, [])
            self._files.setdefault(order.world, []).append(orphan_guard.file_of(rank_fds.trace))
            self._send({"op": "fork", "order": order.to_json()}, rank_fds.all())

    def fileno(self) -> int:
        """A descriptor that is readable when the zygote has sent a message."""
        return self._control.fileno()

    def has_news(self, world: int) -> bool:
        """Whether news of this world were already read for another one."""
        return bool(self._news.get(world))

    def news(self, world: int) -> list[ProcessExit | StopChange]:
        """Ends and stops of this world's ranks since the last call."""
        self._read()
        out = self._news.get(world, [])
        self._news[world] = []
        return out

    def _read(self) -> None:
        while self._readable():
            try:
                data = self._control.recv(MESSAGE_BYTES)
            except OSError:
                data = b""
            if not data:
                raise self._lost_error()
            message = json.loads(data)
            if "importing" in message:
                self._importing = message["importing"]
            elif "ready" in message:
                self._unready -= 1
            else:
                self._news.setdefault(message["world"], []).append(_news(message))

    def forget(self, world: int) -> None:
        """Drop the state of a world that has ended."""
        self._news.pop(world, None)
        self._files.pop(world, None)

    def _signal(self, world: int, rank: int, signum: int) -> None:
        self._send({"op": "signal", "world": world, "rank": rank, "signum": signum})

    def preload(self, modules: Sequence[str]) -> None:
        """Import these in the zygote, so that later ranks have them."""
        new = [name for name in modules if name not in self._preloaded]
        self._preloaded.update(new)
        for start in range(0, len(new), 200):
            self._unready += 1
            self._importing = new[start]
            self._send({"op": "preload", "modules": new[start : start + 200]})

    def close(self) -> None:
        """End the zygote and all its ranks; bounded in time."""
        if os.getpid() != self._owner or self._control.fileno() < 0:
            return
        self._control.close()
        if not self.lost:
            self._end(CLOSE_S)

    def _end(self, within_s: float) -> int:
        """The zygote's exit status; it is killed if it does not end by itself."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            pid, status = self._wait(os.WNOHANG)
            if pid:
                return status
            time.sleep(0.001)
        os.kill(self._pid, signal.SIGKILL)
        return self._wait(0)[1]

    def _wait(self, flags: int) -> tuple[int, int]:
        try:
            return os.waitpid(self._pid, flags)
        except ChildProcessError:  # a test waited for any child, and got ours
            return self._pid, 0

    def _lost_error(self, why: str = "") -> LauncherLostError:
        """The error to raise when the zygote has ended.

        The first call asks the kernel for the reason, unless it is known, ends the zygote, and
        kills the processes that ranks left behind.
        """
        if not self.lost:
            status = self._end(0.0 if why else CLOSE_S)
            code = os.waitstatus_to_exitcode(status)
            how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
            how = why or how
            self.lost = f"the zygote (process {self._pid}), which ranks are forked from, {how}"
            files = {file for of_world in self._files.values() for file in of_world}
            orphan_guard.sweep(f"{self._session}:", files)
        return LauncherLostError(self.lost)

    def _readable(self) -> bool:
        return bool(select.select([self._control], [], [], 0)[0])

    def _send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if self.lost:
            raise self._lost_error()
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], fds)
        except TimeoutError as exc:  # a test has stopped it
            raise self._lost_error(f"took no order for {SEND_S:g} s") from exc
        except OSError as exc:
            raise self._lost_error() from exc


def run_zygote(parent: int, make: Callable[[], Zygote], *, detach: bool) -> NoReturn:
    """The zygote's whole life; never returns into the frames that it was forked in."""
    code = 1
    zygote: Zygote | None = None
    try:
        zygote = make()
        zygote.settle(parent, detach)
        zygote.warm_up()
        zygote.serve()
        code = 0
    except SystemExit:
        code = 0
    except BaseException:  # noqa: BLE001 - the frames below belong to the controller's session
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            if zygote is not None:
                zygote.end()
            sys.stderr.flush()
        os._exit(code)


def _news(message: dict[str, Any]) -> ProcessExit | StopChange:
    if "stopped" in message:
        return StopChange(message["rank"], message["stopped"])
    return ProcessExit(message["rank"], message["status"], tuple(message["leaked_processes"]))
