"""The hub and a seat, each against a scripted other side; the frames between them."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_dcp._harness.outer.seat import ControllerLostError, Seat
from pytest_dcp._harness.outer.seat_hub import CLOCK_ROUNDS, SeatHub
from pytest_dcp._harness.outer.seat_link import SeatLink
from pytest_dcp._harness.outer.seat_messages import (
    ClockAsk,
    ClockReply,
    FromRank,
    LaunchRank,
    RankEnded,
    RankFile,
    RankStopped,
    SeatDecoder,
    SeatJoin,
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
    LauncherLostError,
    OuterPlace,
    ProcessExit,
    RankFds,
    RankLaunch,
    StopChange,
)
from pytest_dcp._harness.world.rank_handle import RankEnd

WITHIN_S = 60.0
MESSAGES: list[SeatMessage] = [
    SeatJoin("t", 1, "n", "m", "p", (("a::b", "a world of 2"),), "no", False, 3),
    FromRank(1, 2, b"\x00bytes"),
    RankFile(1, 2, "out", 9, 2, b"abcd"),
    RankEnded(1, 2, -9, ("7 (sleep)",), "gone"),
    LaunchRank("{}"),
]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class ScriptedSeat:
    """A seat's end of a connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WITHIN_S)
        self._decoder = SeatDecoder()
        self._pending: list[SeatMessage] = []

    def send(self, *messages: SeatMessage) -> None:
        self.socket.sendall(b"".join(map(encode_seat_message, messages)))

    def receive(self) -> SeatMessage | None:
        """The next message; None at the end."""
        while not self._pending:
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            self._pending = self._decoder.feed(data)
        return self._pending.pop(0)

    def join(self, hub: SeatHub, rank: int, ahead_s: float = 0.0) -> None:
        self.send(SeatJoin(hub.token, rank, f"node{rank}", f"machine{rank}", f"process {rank}"))
        for _ in range(CLOCK_ROUNDS):
            ask = self.receive()
            assert isinstance(ask, ClockAsk)
            self.send(ClockReply(ask.sent_s, time.monotonic() + ahead_s))
        until(lambda: rank not in hub.ranks_to_join())


@pytest.fixture
def hub() -> Iterator[SeatHub]:
    listener = socket.create_server(("127.0.0.1", 0))
    hub = SeatHub(2, "torchrun", listener)
    hub.port = listener.getsockname()[1]  # type: ignore[attr-defined]  # for the tests
    hub.start()
    yield hub
    hub.close(WITHIN_S)
    for rank in hub.joins():
        hub.seat(rank).link.close()


@pytest.fixture
def seat(hub: SeatHub) -> Iterator[ScriptedSeat]:
    seat = ScriptedSeat(hub.port)  # type: ignore[attr-defined]  # as above
    seat.join(hub, 1, ahead_s=1000.0)
    yield seat
    seat.socket.close()


@pytest.fixture
def end(hub: SeatHub, seat: ScriptedSeat) -> Iterator[RankEnd]:
    """The controller's end of rank 1 of world 7, in the seat."""
    end = RankEnd()
    hub.open_channel((7, 1), 1, end.fds())
    end.theirs.close()
    yield end
    end.close()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_frames_arrive_as_they_were_sent_also_in_pieces(message: SeatMessage) -> None:
    decoder, frame = SeatDecoder(), encode_seat_message(message)
    arrived = [one for at in range(len(frame)) for one in decoder.feed(frame[at : at + 1])]
    assert arrived == [message]


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(1 << 30, 1 << 30),
        HEADER.pack(4, 0) + b"none",
        HEADER.pack(16, 0) + b'["Verdict", {}]x',
        HEADER.pack(26, 0) + b'["Verdict", {"code": "a"}]',
        HEADER.pack(14, 0) + b'["Unheard",{}]',
    ],
)
def test_other_bytes_are_no_frames(data: bytes) -> None:
    with pytest.raises(WireError):
        SeatDecoder().feed(data)


def test_a_seat_joins_and_its_clock_is_measured(hub: SeatHub, seat: ScriptedSeat) -> None:
    assert hub.ranks_to_join() == [0]
    assert hub.joins()[1].name == "process 1"
    assert hub.seat(1).clock_ahead_s == pytest.approx(1000.0, abs=30.0)
    assert hub.unready() == [1]
    seat.send(SeatNote("a note"), SeatReady())
    until(lambda: not hub.unready())
    assert hub.take_notes() == ["rank 1: a note"]


@pytest.mark.parametrize("token", ["", "0" * 32])
def test_a_stranger_is_turned_away(hub: SeatHub, token: str) -> None:
    stranger = ScriptedSeat(hub.port)  # type: ignore[attr-defined]  # as above
    with contextlib.closing(stranger.socket):
        stranger.send(SeatJoin(token, 0, "n", "m", "p"))
        assert stranger.receive() is None
        assert hub.ranks_to_join() == [0, 1]


def test_a_taken_place_and_a_message_before_joining_are_turned_away(
    hub: SeatHub, seat: ScriptedSeat
) -> None:
    for message in (SeatJoin(hub.token, 1, "n", "m", "p"), SeatReady()):
        stranger = ScriptedSeat(hub.port)  # type: ignore[attr-defined]  # as above
        with contextlib.closing(stranger.socket):
            stranger.send(message)
            assert stranger.receive() is None
    assert not hub.lost_seats()


def test_bytes_pass_in_both_directions(hub: SeatHub, seat: ScriptedSeat, end: RankEnd) -> None:
    large = bytes(range(256)) * 4096  # more than a socket holds
    end.socket.settimeout(WITHIN_S)
    end.socket.sendall(b"to the rank")
    assert seat.receive() == ToRank(7, 1, b"to the rank")
    seat.send(FromRank(7, 1, large), RankEnded(7, 1, 0))
    arrived = b""
    while chunk := end.receive():
        arrived += chunk
    assert arrived == large
    until(lambda: hub.has_news(7))
    assert hub.take_news(7) == [ProcessExit(1, 0)]


def test_a_ranks_files_are_as_in_its_seat(seat: ScriptedSeat, end: RankEnd) -> None:
    seat.send(
        RankFile(7, 1, "err", 5, payload=b"error"),
        RankFile(7, 1, "out", 200_000, tail=4, payload=b"head" + b"tail"),
        RankFile(7, 1, "draws", 3, payload=b"old"),
        RankFile(7, 1, "draws", 2, payload=b"ne"),
    )
    until(lambda: end.read_draws() == b"ne")
    assert end.read(end.err) == "error"
    assert os.fstat(end.out).st_size == 200_000
    assert end.read(end.out).startswith("head")
    assert end.read(end.out).endswith("tail")


def test_a_seats_end_is_the_end_of_its_ranks(
    hub: SeatHub, seat: ScriptedSeat, end: RankEnd
) -> None:
    seat.send(RankStopped(7, 1, True))
    until(lambda: hub.has_news(7))
    assert hub.take_news(7) == [StopChange(1, True)]
    seat.socket.close()
    until(lambda: hub.has_news(7))
    how = "its process under torchrun (process 1) is gone or unreachable"
    assert hub.take_news(7) == [ProcessExit(1, 1, how=how)]
    assert hub.lost_seats() == {1: how}
    hub.send([1], Verdict(0))  # goes nowhere


def test_a_seat_that_sends_no_frames_is_lost(hub: SeatHub, seat: ScriptedSeat) -> None:
    seat.socket.sendall(HEADER.pack(4, 0) + b"none")
    until(hub.lost_seats)
    assert "sent what is no message" in hub.lost_seats()[1]


def test_a_world_that_is_forgotten_sends_no_news(
    hub: SeatHub, seat: ScriptedSeat, end: RankEnd
) -> None:
    hub.forget(7)
    seat.send(RankEnded(7, 1, -9), SeatReady())
    until(lambda: not hub.unready())
    assert not hub.has_news(7)


class ForkingLauncher:
    """A launcher that only notes what it is asked for; `end` is the end of its one rank."""

    def __init__(self) -> None:
        self.orders: list[RankLaunch] = []
        self.acts: list[str] = []
        self.fds: list[int] = []
        self.is_lost = False
        self.is_closed = False
        self._changes: list[ProcessExit | StopChange] = []
        self._wake_r, self._wake_w = socket.socketpair()

    def launch(self, orders: Sequence[RankLaunch], fds: Sequence[RankFds]) -> None:
        self.orders += orders
        self.fds = [os.dup(fd) for fd in fds[0].all()]

    def end(self, status: int) -> None:
        self._changes.append(ProcessExit(self.orders[-1].rank, status))
        self._wake_w.send(b"x")

    def lose(self) -> None:
        self.is_lost = True
        self._wake_w.send(b"x")

    def news(self, world: int) -> list[ProcessExit | StopChange]:
        self._wake_r.recv(4096)
        if self.is_lost:
            raise LauncherLostError("the zygote was killed")
        changes, self._changes = self._changes, []
        return changes

    def fileno(self) -> int:
        return self._wake_r.fileno()

    def stacks(self, world: int, rank: int) -> None:
        self.acts.append(f"stacks of {world}:{rank}")

    def at_work(self, world: int, rank: int, pid: int) -> bool:
        return True

    def main_thread_cpu_s(self, world: int, rank: int, pid: int) -> float:
        return 1.0

    def await_ready(self) -> None: ...

    def kill(self, world: int, rank: int) -> None: ...

    def forget(self, world: int) -> None: ...

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self._wake_r.close()
        self._wake_w.close()
        self.is_closed = True


ORDER = RankLaunch(
    session="s", world=7, rank=1, size=2, backend="gloo", device="cpu", mesh=(2,),
    mesh_dim_names=None, store="tcp://h:1/p", master_port=1, seed=0, isolation="test",
    basetemp="/controllers", place=OuterPlace(0, 1, 1, "10.0.0.1"),
)  # fmt: skip


class Controller:
    """The other side of a seat that runs in a thread."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(WITHIN_S)
        self.socket = ours
        self.launchers = [ForkingLauncher(), ForkingLauncher()]
        self.outcome: int | BaseException = -1
        self.seat_socket = theirs
        self._decoder = SeatDecoder()
        self._pending: list[SeatMessage] = []
        launchers: list[Any] = self.launchers
        seat = Seat(
            SeatLink(theirs),
            launchers[0],
            lambda lost: launchers[1],
            number=3,
            folder=folder,
            interface="eth7",
            device_index=0,
        )
        self.thread = threading.Thread(target=self._serve, args=(seat,))
        self.thread.start()

    def _serve(self, seat: Seat) -> None:
        try:
            self.outcome = seat.serve()
        except ControllerLostError as error:
            self.outcome = error

    def send(self, *messages: SeatMessage) -> None:
        self.socket.sendall(b"".join(map(encode_seat_message, messages)))

    def receive(self, kind: type[SeatMessage]) -> Any:
        """The next message of a kind; others are skipped."""
        while True:
            while not self._pending:
                self._pending = self._decoder.feed(self.socket.recv(1 << 16))
            message = self._pending.pop(0)
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self.socket.close()
        self.thread.join(WITHIN_S)
        self.seat_socket.close()
        for launcher in self.launchers:
            if not launcher.is_closed:
                launcher.close()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = Controller(tmp_path)
    assert controller.receive(SeatReady) == SeatReady()
    yield controller
    controller.close()


def launch_rank(controller: Controller) -> tuple[ForkingLauncher, socket.socket]:
    """A rank that the seat has started, and its end of the socket."""
    controller.send(LaunchRank(ORDER.to_json()))
    launcher = controller.launchers[0]
    until(lambda: launcher.fds)
    return launcher, socket.socket(fileno=os.dup(launcher.fds[0]))


def test_a_seat_has_ranks_of_its_own_name_and_folder(
    controller: Controller, tmp_path: Path
) -> None:
    launcher, rank = launch_rank(controller)
    with rank:
        (order,) = launcher.orders
        assert (order.session, order.basetemp) == ("s-3", str(tmp_path / "world7-rank1"))
        assert order.place == replace(ORDER.place or OuterPlace(0, 0, 0, ""), interface="eth7")
        rank.sendall(b"hello")
        assert controller.receive(FromRank) == FromRank(7, 1, b"hello")
        controller.send(ToRank(7, 1, b"world"))
        assert rank.recv(100) == b"world"
        controller.send(SignalRank(7, 1, "stacks"))
        until(lambda: launcher.acts == ["stacks of 7:1"])


def test_the_files_of_a_rank_come_before_its_end(controller: Controller) -> None:
    launcher, rank = launch_rank(controller)
    os.write(launcher.fds[1], b"out" + bytes(100_000) + b"end")
    os.write(launcher.fds[4], b"draws")
    with rank:
        rank.sendall(b"last words")
    launcher.end(-9)
    assert controller.receive(RankFile) == RankFile(7, 1, "draws", 5, payload=b"draws")
    assert controller.receive(FromRank) == FromRank(7, 1, b"last words")
    printed = controller.receive(RankFile)
    assert (printed.name, printed.size) == ("out", 100_006)
    assert printed.payload.startswith(b"out")
    assert printed.payload.endswith(b"end")
    assert controller.receive(RankEnded) == RankEnded(7, 1, -9)


def test_a_lost_launcher_ends_its_ranks_and_is_replaced(controller: Controller) -> None:
    launcher, rank = launch_rank(controller)
    with rank:
        launcher.lose()
        assert controller.receive(RankEnded).how == "the zygote was killed"
        assert "ranks are spawned from here on" in controller.receive(SeatNote).text
        controller.send(LaunchRank(replace(ORDER, world=8).to_json()))
        until(lambda: controller.launchers[1].orders)


def test_a_seat_ends_with_the_verdict(controller: Controller) -> None:
    controller.send(Verdict(5))
    until(lambda: controller.outcome == 5)
    assert controller.launchers[0].is_closed


def test_a_seat_without_a_controller_kills_its_ranks(controller: Controller) -> None:
    launcher, rank = launch_rank(controller)
    with rank:
        controller.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: isinstance(controller.outcome, ControllerLostError))
        assert launcher.is_closed
