"""Drives a world's ranks: carries out the supervisor's decisions, and passes events to it.

Enters: actions, messages on the ranks' sockets, and what the launcher says of processes. Every wait
is bounded by the supervisor's own clock. An interrupt of this process never breaks into an action
or into the handling of a message; see `controller_interrupts`.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable, Sequence

from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.frames import WireError
from pytest_dcp._harness.protocol.launcher import (
    Launcher,
    LauncherLostError,
    RankLaunch,
    StopChange,
)
from pytest_dcp._harness.protocol.messages import (
    DebugAnswer,
    SubReport,
    Up,
    encode,
)
from pytest_dcp._harness.world.controller_interrupts import Interrupts
from pytest_dcp._harness.world.rank_handle import SEND_S, RankEnd
from pytest_dcp._harness.world.rank_states import (
    Action,
    Continue,
    Dump,
    Interrupt,
    KillRank,
    Send,
    StopRank,
)
from pytest_dcp._harness.world.supervisor import Supervisor

LOOK_S = 0.25
"""How often the captured output's size and the launcher are looked at."""


class RankLoop:
    """The loop of one world. Not thread-safe: one thread drives it."""

    def __init__(
        self, world: int, supervisor: Supervisor, launcher: Launcher, *, output_limit_bytes: int
    ) -> None:
        self.supervisor = supervisor
        self.ranks: list[RankEnd] = []
        self.interrupts = Interrupts()
        self.sub_reports: list[tuple[int, dict[str, object]]] = []
        self.leaked_processes: list[tuple[int, str]] = []
        """(rank, `pid (command)`) of processes that ranks left behind; they were killed."""
        self.statuses: dict[int, int] = {}
        """By rank, the exit code of its process, or minus the signal, once it has ended."""
        self._world = world
        self._launcher = launcher
        self._selector = selectors.DefaultSelector()
        self._output_limit_bytes = output_limit_bytes
        self._look_at = 0.0

    def open(self, size: int) -> None:
        """Make the sockets and files of the ranks, and listen to them."""
        self.ranks = [RankEnd() for _ in range(size)]
        for rank, end in enumerate(self.ranks):
            self._selector.register(end.socket, selectors.EVENT_READ, rank)
        self._selector.register(self._launcher.fileno(), selectors.EVENT_READ, -1)

    def launch(self, orders: Sequence[RankLaunch]) -> None:
        """Start the ranks' processes."""
        self._launcher.launch(orders, [end.fds() for end in self.ranks])
        for end in self.ranks:
            end.theirs.close()

    def run_until_settled(self) -> None:
        """Loop until every rank has answered, died or been killed."""
        self._step_until_settled()
        # Stopped ranks do not hold the others up; once those are done, none can continue them.
        self.act(self.supervisor.dismiss(time.monotonic()))
        self._step_until_settled()

    def _step_until_settled(self) -> None:
        while not self.supervisor.settled:
            self.step()

    def step(self, within_s: float = LOOK_S) -> None:
        """Wait for one thing to happen, and handle it."""
        with self.interrupts.held():
            if self._launcher.has_news(self._world) and self._handle_process_changes():
                return
        now = time.monotonic()
        wake = min(self.supervisor.wake_at() - now, within_s)
        ready = self._selector.select(max(0.0, wake))
        with self.interrupts.held():
            self._handle(ready)

    def _handle(self, ready: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        """Handle received data and due timers."""
        for key, _ in ready:
            if key.data < 0:
                self._handle_process_changes()
            else:
                self._read_messages(key.data)
        now = time.monotonic()
        self.act(self.supervisor.tick(now))
        if not self.supervisor.paused:
            self.interrupts.ignored = False
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look_at_output(now)
            self._look_at_launcher()

    def drain(self) -> None:
        """What happened between phases: a rank that died."""
        with self.interrupts.held():
            if self._launcher.has_news(self._world):
                self._handle_process_changes()
            for key, _ in self._selector.select(0):
                if key.data < 0:
                    self._handle_process_changes()
                else:
                    self._read_messages(key.data)

    def _handle_process_changes(self) -> bool:
        """Handle ends and stops of processes; returns whether there were any.

        Call it when the launcher is readable, and when another world has read news for this one.
        """
        try:
            news = self._launcher.news(self._world)
        except LauncherLostError as lost:
            self._abandon(lost)
            return False
        for change in news:
            # The supervisor assumes that a rank's messages come before its exit.
            self._drain_socket(change.rank)
            now = time.monotonic()
            if isinstance(change, StopChange):
                self.act(self.supervisor.see_stop_change(change.rank, now, stopped=change.stopped))
                continue
            self.leaked_processes += [(change.rank, leaked) for leaked in change.leaked_processes]
            self.statuses[change.rank] = change.status
            self.act(self.supervisor.see_exit(change.rank, change.status, now, change.how))
        return bool(news)

    def _abandon(self, lost: LauncherLostError) -> None:
        """Without its launcher no more events of the world's ranks will arrive."""
        with contextlib.suppress(KeyError, ValueError):  # it was, or it is closed
            self._selector.unregister(self._launcher.fileno())
        self.supervisor.abandon(str(lost), time.monotonic())

    def _drain_socket(self, rank: int) -> None:
        """A rank may have answered and died since the last look: the answer counts."""
        with contextlib.suppress(KeyError):
            sock = self.ranks[rank].socket
            self._selector.get_key(sock)
            sock.setblocking(False)
            while self._read_messages(rank):
                pass
            sock.settimeout(SEND_S)

    def _read_messages(self, rank: int) -> bool:
        """Read a rank's messages; False if there is nothing (more)."""
        end = self.ranks[rank]
        now = time.monotonic()
        try:
            data = end.receive()
            if data:
                self._handle_messages(rank, data, now)
                return True
        except (BlockingIOError, TimeoutError):
            return False
        except WireError as error:
            end.unwatch(self._selector)
            text = f"data on its report socket in {self.supervisor.phase} is refused: {error}"
            self.act(self.supervisor.refuse(rank, text, now))
            return False
        except OSError:
            pass  # reset: as good as its end
        end.unwatch(self._selector)
        exiting = end.pid != 0 and linux.is_exiting(end.pid)
        self.act(self.supervisor.see_close(rank, now, exiting=exiting))
        return False

    def _handle_messages(self, rank: int, data: bytes, now: float) -> None:
        for message in self.ranks[rank].decoder.feed(data):
            if isinstance(message, SubReport):
                self.sub_reports.append((rank, message.report))
            elif isinstance(message, Up):
                self.act(self.supervisor.hear(rank, message, now))
            else:
                raise WireError(f"a {type(message).__name__}, which only the controller sends")

    def act(self, actions: Sequence[Action]) -> None:
        frames: dict[int, bytes] = {}  # an order to all ranks is encoded once
        for action in actions:
            match action:
                case Send(rank, message):
                    if isinstance(message, DebugAnswer) and message.granted:
                        self.interrupts.ignored = True
                    if id(message) not in frames:
                        frames[id(message)] = encode(message)
                    self._send(rank, frames[id(message)])
                case Dump(rank):
                    self.ranks[rank].empty_trace()
                    self._signal(self._launcher.stacks, rank)
                case Interrupt(rank):
                    self._signal(self._launcher.interrupt, rank)
                case KillRank(rank):
                    self._signal(self._launcher.kill, rank)
                case StopRank(rank):
                    self._signal(self._launcher.pause, rank)
                case Continue(rank):
                    self._signal(self._launcher.resume, rank)

    def _send(self, rank: int, frame: bytes) -> None:
        try:
            self.ranks[rank].socket.sendall(frame)
        except TimeoutError:
            # End it at once: other answers may be due to it, and each would wait again.
            text = f"took nothing from its report socket for {SEND_S:g} s"
            self.act(self.supervisor.refuse(rank, text, time.monotonic()))
        except OSError:
            self.act(self.supervisor.see_close(rank, time.monotonic()))

    def _signal(self, signal_rank: Callable[[int, int], None], rank: int) -> None:
        try:
            signal_rank(self._world, rank)
        except LauncherLostError as lost:
            self._abandon(lost)

    def at_work(self, rank: int) -> bool:
        """Whether a rank does something, polls, or would if it had a processor."""
        return self._launcher.at_work(self._world, rank, self.ranks[rank].pid)

    def main_thread_cpu_s(self, rank: int) -> float:
        """Processor time of a rank's main thread, in seconds."""
        return self._launcher.main_thread_cpu_s(self._world, rank, self.ranks[rank].pid)

    def _look_at_output(self, now: float) -> None:
        for rank, end in enumerate(self.ranks):
            size = os.fstat(end.out).st_size + os.fstat(end.err).st_size
            if size > self._output_limit_bytes:
                self.act(self.supervisor.see_flood(rank, size, now))

    def _look_at_launcher(self) -> None:
        try:
            self._launcher.check_running()
        except LauncherLostError as lost:
            self._abandon(lost)

    def close(self) -> None:
        """Close everything that `open` created; the ranks have ended."""
        self.interrupts.ignored = False
        self._selector.close()
        for end in self.ranks:
            end.close()
        self._launcher.forget(self._world)
