"""A seat: starts one rank of each world on this machine, and passes on what it says and receives.

Enters: messages of the controller, and the bytes, files and end of the rank. Leaves: the same for
the other side. See `seat_messages` for the order of the messages. One thread drives a seat.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pytest_dcp._harness.outer.seat_link import SeatLink
from pytest_dcp._harness.outer.seat_messages import (
    RANK_FILES,
    ClockAsk,
    ClockReply,
    ForgetWorld,
    FromRank,
    LaunchRank,
    Preload,
    RankActivity,
    RankClosed,
    RankEnded,
    RankFile,
    RankStopped,
    SeatDecoder,
    SeatMessage,
    SeatNote,
    SeatReady,
    SignalRank,
    ToRank,
    Verdict,
    encode_seat_message,
)
from pytest_dcp._harness.protocol.frames import HEADER, WireError
from pytest_dcp._harness.protocol.launcher import (
    Launcher,
    LauncherLostError,
    RankLaunch,
    StopChange,
)
from pytest_dcp._harness.world.rank_handle import DRAWS_BYTES, END_BYTES, RankEnd
from pytest_dcp.errors import DcpError, WorldError

LOOK_S = 0.1
"""How often a rank's activity and the size of its output are looked at."""
LARGE_BYTES = 1 << 20
"""Of a rank's output while it runs: its size is reported, since the controller has a limit."""
CPU_S = 0.004
"""Processor time that is worth a report."""


class ControllerLostError(DcpError):
    """The connection to the controller ended without a verdict."""


@dataclass(slots=True)
class _SeatedRank:
    """A rank of this seat."""

    world: int
    rank: int
    end: RankEnd
    link: SeatLink
    sent_draws: bytes = b""
    sent_sizes: dict[str, int] = field(default_factory=dict)
    sent_activity: tuple[bool, float] = (False, 0.0)


class Seat:
    """Serves the controller until it says how the session ended."""

    def __init__(
        self,
        link: SeatLink,
        launcher: Launcher,
        replace_launcher: Callable[[Launcher], Launcher],
        *,
        number: int,
        folder: Path,
        interface: str,
        device_index: int,
    ) -> None:
        self._link = link
        self._decoder = SeatDecoder()
        self._launcher = launcher
        self._replace_launcher = replace_launcher
        self._number = number
        self._folder = folder
        self._interface = interface
        self._device_index = device_index
        self._ranks: dict[tuple[int, int], _SeatedRank] = {}
        self._selector = selectors.DefaultSelector()
        self._code: int | None = None
        self._look_at = 0.0

    def serve(self) -> int:
        """Serve; returns the session's exit code. Raises `ControllerLostError`."""
        self._selector.register(self._link.socket, selectors.EVENT_READ, self._link)
        self._selector.register(self._launcher.fileno(), selectors.EVENT_READ, None)
        try:
            with self._replacing_lost():
                self._launcher.await_ready()
            self._send(SeatReady())
            while self._code is None:
                self._step()
            return self._code
        finally:
            self._launcher.close()
            self._selector.close()
            for rank in self._ranks.values():
                rank.end.close()

    def note(self, text: str) -> None:
        """Have the controller tell the user."""
        self._send(SeatNote(text))

    def _send(self, message: SeatMessage) -> None:
        self._link.send(encode_seat_message(message))

    def _step(self) -> None:
        for link in (self._link, *(rank.link for rank in self._ranks.values())):
            self._watch(link)
        # Without a rank nothing changes here, and the end of the connection is an event, too.
        for key, mask in self._selector.select(LOOK_S if self._ranks else None):
            if key.data is None:
                self._read_news()
            elif key.data is self._link:
                self._exchange_with_controller(mask)
            elif isinstance(key.data, _SeatedRank):
                self._exchange_with_rank(key.data, mask)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            for rank in self._ranks.values():
                self._report_activity(rank)

    def _watch(self, link: SeatLink) -> None:
        """Wait until the socket takes bytes, if some wait for it."""
        try:
            key = self._selector.get_key(link.socket)
        except KeyError:  # a rank that closed its end
            return
        needed = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.has_unsent else 0)
        if key.events != needed:
            self._selector.modify(link.socket, needed, key.data)

    # Messages of the controller.

    def _exchange_with_controller(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            self._link.flush()
        data = self._link.receive()
        if data == b"":
            raise ControllerLostError("the connection to rank 0 has ended")
        for message in self._decoder.feed(data or b""):
            self._obey(message)

    def _obey(self, message: SeatMessage) -> None:
        match message:
            case ClockAsk(sent_s):
                self._send(ClockReply(sent_s, time.monotonic()))
            case LaunchRank():
                self._launch(RankLaunch.from_json(message.order))
            case ToRank():
                if (rank := self._ranks.get((message.world, message.rank))) is not None:
                    rank.link.send(message.payload)
            case SignalRank():
                self._signal(message)
            case Preload():
                with self._replacing_lost():
                    self._launcher.preload(message.modules)
            case ForgetWorld():
                self._forget(message.world)
            case Verdict():
                self._code = message.code

    def _launch(self, order: RankLaunch) -> None:
        device = f"cuda:{self._device_index}" if order.device == "cuda" else order.device
        order = replace(
            order,
            # The processes of a session are found by this name, and each seat looks for its own.
            session=f"{order.session}-{self._number}",
            basetemp=str(self._folder / f"world{order.world}-rank{order.rank}"),
            device=device,
            place=None if order.place is None else replace(order.place, interface=self._interface),
        )
        end = RankEnd()
        rank = _SeatedRank(order.world, order.rank, end, SeatLink(end.socket))
        self._ranks[order.world, order.rank] = rank
        self._selector.register(end.socket, selectors.EVENT_READ, rank)
        with self._replacing_lost():
            try:
                self._launcher.await_ready()
                self._launcher.launch([order], [end.fds()])
            except LauncherLostError:
                raise
            except WorldError as error:
                self._end(rank, RankEnded(rank.world, rank.rank, 1, how=str(error)))
        end.theirs.close()

    def _signal(self, message: SignalRank) -> None:
        rank = self._ranks.get((message.world, message.rank))
        if rank is None:
            return
        launcher, place = self._launcher, (message.world, message.rank)
        with self._replacing_lost():
            match message.act:
                case "stacks":
                    rank.end.empty_trace()
                    launcher.stacks(*place)
                case "interrupt":
                    launcher.interrupt(*place)
                case "kill":
                    launcher.kill(*place)
                case "pause":
                    launcher.pause(*place)
                case "resume":
                    launcher.resume(*place)

    def _forget(self, world: int) -> None:
        for rank in [rank for rank in self._ranks.values() if rank.world == world]:
            with self._replacing_lost():
                self._launcher.kill(world, rank.rank)
            self._drop(rank)
        self._launcher.forget(world)

    # What ranks do.

    def _exchange_with_rank(self, rank: _SeatedRank, mask: int) -> None:
        if mask & selectors.EVENT_WRITE:
            rank.link.flush()
        if mask & selectors.EVENT_READ:
            self._read_from_rank(rank)

    def _read_from_rank(self, rank: _SeatedRank) -> bool:
        """Pass on what a rank sent; False if there is nothing (more)."""
        try:
            data = rank.end.receive()
        except BlockingIOError:
            return False
        except WireError as error:
            text = str(error).encode()
            data = HEADER.pack(len(text), 0) + text  # no message: the controller refuses it
        except OSError:
            data = b""
        if not data:
            rank.end.unwatch(self._selector)
            self._send(RankClosed(rank.world, rank.rank))
            return False
        self._report_draws(rank)
        self._send(FromRank(rank.world, rank.rank, data))
        return True

    def _read_news(self) -> None:
        with self._replacing_lost():
            for world in {rank.world for rank in self._ranks.values()} or {-1}:
                for change in self._launcher.news(world):
                    rank = self._ranks.get((world, change.rank))
                    if rank is None:
                        continue
                    if isinstance(change, StopChange):
                        self._send(RankStopped(world, change.rank, change.stopped))
                        continue
                    leaked = change.leaked_processes
                    self._end(rank, RankEnded(world, change.rank, change.status, leaked))

    def _end(self, rank: _SeatedRank, end_report: RankEnded) -> None:
        """Report the end of a rank, after all that it left."""
        with contextlib.suppress(KeyError):
            self._selector.get_key(rank.end.socket)
            while self._read_from_rank(rank):
                pass
        self._report_draws(rank)
        for name in RANK_FILES:
            if name != "draws":
                self._report_file(rank, name)
        self._send(end_report)
        self._drop(rank)

    def _drop(self, rank: _SeatedRank) -> None:
        rank.end.unwatch(self._selector)
        rank.end.close()
        self._ranks.pop((rank.world, rank.rank), None)

    def _report_draws(self, rank: _SeatedRank) -> None:
        """A property's draws are read after each answer, so they precede it."""
        draws = rank.end.read_draws()
        if draws != rank.sent_draws:
            rank.sent_draws = draws
            size = min(len(draws), DRAWS_BYTES)
            self._send(RankFile(rank.world, rank.rank, "draws", size, payload=draws))

    def _report_file(self, rank: _SeatedRank, name: str) -> None:
        """The two ends of a file: the controller shows no more."""
        fd: int = getattr(rank.end, name)
        size = os.fstat(fd).st_size
        head, tail = os.pread(fd, END_BYTES, 0), b""
        if size > END_BYTES:
            tail = os.pread(fd, END_BYTES, max(END_BYTES, size - END_BYTES))
        if size:
            self._send(RankFile(rank.world, rank.rank, name, size, len(tail), head + tail))

    def _report_activity(self, rank: _SeatedRank) -> None:
        self._report_draws(rank)
        pid = rank.end.pid
        at_work = self._launcher.at_work(rank.world, rank.rank, pid)
        cpu_s = self._launcher.main_thread_cpu_s(rank.world, rank.rank, pid)
        was_at_work, told_s = rank.sent_activity
        if at_work != was_at_work or abs(cpu_s - told_s) >= CPU_S:
            rank.sent_activity = at_work, cpu_s
            self._send(RankActivity(rank.world, rank.rank, at_work, cpu_s))
        for name in ("out", "err"):
            size = os.fstat(getattr(rank.end, name)).st_size
            if max(size, rank.sent_sizes.get(name, 0)) >= LARGE_BYTES:
                if size != rank.sent_sizes.get(name):
                    self._send(RankFile(rank.world, rank.rank, name, size))
                rank.sent_sizes[name] = size

    # The launcher of this machine.

    @contextlib.contextmanager
    def _replacing_lost(self) -> Iterator[None]:
        """Go on with another launcher when this one is lost, and its ranks with it."""
        try:
            yield
        except LauncherLostError as lost:
            for rank in list(self._ranks.values()):
                self._end(rank, RankEnded(rank.world, rank.rank, 1, how=str(lost)))
            self._selector.unregister(self._launcher.fileno())
            self._launcher = self._replace_launcher(self._launcher)
            self._selector.register(self._launcher.fileno(), selectors.EVENT_READ, None)
            self.note(f"{lost}; its ranks are spawned from here on")
