"""The hub and a seat, each against a scripted other side; the frames between them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from pytest_dcp._harness.outer.seat_hub import CLOCK_ROUNDS, SeatHub
from pytest_dcp._harness.outer.seat_messages import (
    HEADER,
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
    SeatWireError,
    ToRank,
    Verdict,
    encode_seat_message,
)
from pytest_dcp._harness.protocol.launcher import ProcessExit, StopChange
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
    with pytest.raises(SeatWireError):
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
