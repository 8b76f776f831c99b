"""A process that carries out orders, and the line to it: see `worker` for the other end.

An order has one answer. Meanwhile the process sends signs of life, with its progress; if they stop,
or the caller has had enough, it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import torch

from pytest_dcp._engine.background.worker import PROGRAM, Advance, Beat, Order
from pytest_dcp._engine.coordinate import PeerAborted
from pytest_dcp._engine.coordinate.failure import Cause
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp.errors import SaverProcessError

START_S = 300.0
"""How long a process may take to start: on a busy machine the imports alone may take a minute."""
GRACE_S = 2.0
"""How long to wait for a process's answer after another rank's save failed: this one failed, too.
"""
LOOK_S = 0.05


class SaverProcess:
    """A background process and the line to it. Used by one thread, which outlives it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            orders = {
                "fd": theirs.fileno(),
                "parent": os.getpid(),
                "path": [path for path in sys.path if isinstance(path, str)],
                "threads": torch.get_num_threads(),
            }
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(orders)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def ask(
        self,
        order: Order,
        check: Callable[[], None],
        silence_s: float,
        memory_fd: int | None = None,
        advance: Callable[[int], None] = lambda count: None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Any:
        """The answer to an order.

        check: called again and again meanwhile; its error ends the wait. silence_s: how long the
        process may give no sign of life. advance: called with the counts that the order sends.
        progress: called with the progress of a save; its error kills the process.

        Raises the order's exception, or that of `progress`, or SaverProcessError.
        """
        try:
            self._connection.send(order)
            if memory_fd is not None:
                send_handle(self._connection, memory_fd, self.process.pid)
            answer = self._answer(check, silence_s, advance, progress)
        except (EOFError, OSError) as error:
            raise SaverProcessError(self._how_it_ended()) from error
        if isinstance(answer, Cause):
            raise answer.rebuild()[0]
        return answer

    def _answer(
        self,
        check: Callable[[], None],
        silence_s: float,
        advance: Callable[[int], None],
        progress: Callable[[Progress], None] | None,
    ) -> Any:
        heard_s = time.monotonic()
        until_s = float("inf")
        while True:
            if self._connection.poll(LOOK_S):
                answer = self._connection.recv()
                heard_s = time.monotonic()
                if isinstance(answer, Advance):
                    advance(answer.count)
                elif not isinstance(answer, Beat):
                    return answer
                elif progress is not None and answer.progress is not None:
                    self._show(answer.progress, progress)
            try:
                check()
            except PeerAborted:
                until_s = min(until_s, time.monotonic() + GRACE_S)
            if time.monotonic() > until_s:
                self._give_up("did not give up its save when another rank's had failed")
            if time.monotonic() > heard_s + silence_s:
                self._give_up(f"has been silent for {silence_s:.3g} s")

    def _show(self, state: Progress, progress: Callable[[Progress], None]) -> None:
        try:
            progress(state)
        except BaseException:
            self.end()
            raise

    def _give_up(self, why: str) -> None:
        self.end()
        raise SaverProcessError(f"the background process {self.process.pid} {why}: it was killed")

    def _how_it_ended(self) -> str:
        try:
            status = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            how = "closed its line: it was killed"
        else:
            how = f"was killed by {_signal(-status)}" if status < 0 else f"exited with {status}"
        self.end()
        return f"the background process {self.process.pid} {how}"

    def end(self) -> None:
        """Kill the process and reap it."""
        self.process.kill()
        self.process.wait()
        self._connection.close()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
