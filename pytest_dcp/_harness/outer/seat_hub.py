"""The controller's connections to its seats, in a thread: copies bytes, keeps news of ranks.

Enters: messages of seats; bytes that the supervisor's loop writes to its ends of ranks. Leaves:
bytes on those ends, contents of the ranks' memory files, and news of processes. See `seat_messages`
for the whole story.

The thread never waits for one socket: what an end does not take is kept (`SeatLink`). The state is
shared with the controller's main thread, under one lock; only the thread touches the selector.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from pytest_dcp._harness.outer.rank_channel import RankChannel, RankKey, open_channel
from pytest_dcp._harness.outer.seat_link import SeatLink, watch_machine
from pytest_dcp._harness.outer.seat_messages import (
    MAX_FRAME_BYTES,
    MAX_STRANGER_BYTES,
    ClockAsk,
    ClockReply,
    ForgetWorld,
    FromRank,
    RankActivity,
    RankClosed,
    RankEnded,
    RankFile,
    RankStopped,
    SeatDecoder,
    SeatJoin,
    SeatMessage,
    SeatNote,
    SeatReady,
    ToRank,
    encode_seat_message,
)
from pytest_dcp._harness.protocol.frames import WireError
from pytest_dcp._harness.protocol.launcher import ProcessExit, RankFds, StopChange

CLOCK_ROUNDS = 5
"""Questions for a seat's clock: the answer that came soonest counts."""
UNREAD_S = 1.0
"""How long a rank's last bytes may wait to be read before its end is reported all the same."""
LOOK_S = 0.25


@dataclass(slots=True, eq=False)
class SeatConnection:
    """A seat as the controller knows it."""

    link: SeatLink
    decoder: SeatDecoder
    join: SeatJoin | None = None
    is_ready: bool = False
    lost: str = ""
    clock_ahead_s: float = 0.0
    clock_rounds: int = 0
    best_trip_s: float = float("inf")

    @property
    def is_joined(self) -> bool:
        """Whether its collection and its clock are known."""
        return self.join is not None and self.clock_rounds >= CLOCK_ROUNDS


@dataclass(slots=True)
class _HubState:
    """What the two threads share."""

    seats: dict[int, SeatConnection] = field(default_factory=dict)
    strangers: list[SeatConnection] = field(default_factory=list)
    """Connections that have not joined."""
    channels: dict[RankKey, RankChannel] = field(default_factory=dict)
    news: dict[int, list[ProcessExit | StopChange]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_ending: bool = False


class SeatHub:
    """All seats of a session."""

    def __init__(self, size: int, launcher_name: str, listener: socket.socket) -> None:
        self.size = size
        self.token = secrets.token_hex(16)
        self.changed = threading.Condition()
        """Notified whenever a seat joins, is ready or is lost. Its lock guards the state."""
        self._launcher_name = launcher_name
        self._listener = listener
        listener.setblocking(False)
        self._state = _HubState()
        self._wake_r, self._wake_w = socket.socketpair()
        self._news_r, self._news_w = socket.socketpair()
        for sock in (self._wake_r, self._wake_w, self._news_r, self._news_w):
            sock.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, "listener")
        self._selector.register(self._wake_r, selectors.EVENT_READ, "wake")
        self._watched: dict[int, tuple[SeatLink, object]] = {}
        self._thread = threading.Thread(target=self._run, name="dcp-seats", daemon=True)

    # For the controller's main thread.

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def adopt(self, sock: socket.socket) -> None:
        """A connection of a seat in this process."""
        with self.changed:
            self._state.strangers.append(SeatConnection(SeatLink(sock), SeatDecoder()))
        self._wake()

    def ranks_to_join(self) -> list[int]:
        """Outer ranks that have not joined."""
        with self.changed:
            seats = self._state.seats
            return [
                rank
                for rank in range(self.size)
                if rank not in seats or not (seats[rank].is_joined or seats[rank].lost)
            ]

    def seat(self, rank: int) -> SeatConnection:
        """The seat of an outer rank that has joined."""
        with self.changed:
            return self._state.seats[rank]

    def joins(self) -> dict[int, SeatJoin]:
        """The first messages of the seats that have joined."""
        with self.changed:
            seats = self._state.seats.items()
            return {rank: seat.join for rank, seat in seats if seat.join is not None}

    def lost_seats(self) -> dict[int, str]:
        """How outer ranks were lost."""
        with self.changed:
            return {rank: seat.lost for rank, seat in self._state.seats.items() if seat.lost}

    def unready(self) -> list[int]:
        """Living seats that cannot start a rank yet."""
        with self.changed:
            seats = self._state.seats.items()
            return [rank for rank, seat in seats if not (seat.is_ready or seat.lost)]

    def take_notes(self) -> list[str]:
        """Lines for the user since the last call."""
        with self.changed:
            notes, self._state.notes = self._state.notes, []
            return notes

    def send(self, ranks: Iterable[int], message: SeatMessage) -> None:
        """Send a message to seats; nothing to lost ones."""
        frame = encode_seat_message(message)
        with self.changed:
            for rank in ranks:
                seat = self._state.seats.get(rank)
                if seat is not None and not seat.lost:
                    seat.link.send(frame)
        self._wake()

    def open_channel(self, key: RankKey, seat: int, fds: RankFds) -> None:
        """Connect the controller's end of a rank with a seat; the descriptors are duplicated."""
        with self.changed:
            self._state.channels[key] = open_channel(key, fds, seat)
            if self._state.seats[seat].lost:
                self._end_channels_of(seat)
        self._wake()

    def activity(self, key: RankKey) -> tuple[bool, float]:
        """Whether a rank works, and its main thread's processor time."""
        with self.changed:
            channel = self._state.channels.get(key)
            return channel.activity if channel is not None else (False, 0.0)

    def fileno(self) -> int:
        """A descriptor that is readable when there are news."""
        return self._news_r.fileno()

    def has_news(self, world: int) -> bool:
        """Whether there are news of a world. Cheap."""
        return bool(self._state.news.get(world))

    def take_news(self, world: int) -> list[ProcessExit | StopChange]:
        """A world's news since the last call."""
        with contextlib.suppress(BlockingIOError):
            self._news_r.recv(4096)
        with self.changed:
            return self._state.news.pop(world, [])

    def forget(self, world: int) -> None:
        """Drop a world."""
        with self.changed:
            seats = set()
            for key, channel in self._state.channels.items():
                if key[0] == world:
                    channel.is_forgotten = True
                    seats.add(channel.seat)
            self._state.news.pop(world, None)
        self.send(sorted(seats), ForgetWorld(world))

    def close(self, within_s: float) -> None:
        """Deliver what was sent, and end the thread; connections stay open until the process ends.

        So seats learn of the end of the process from the end of their connection.
        """
        with self.changed:
            self._state.is_ending = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(within_s)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_w.send(b"x")

    # The thread.

    def _run(self) -> None:
        try:
            self._relay()
        except Exception:
            with self.changed:  # so that no one waits for a seat
                for seat in self._state.seats.values():
                    self._lose(seat, "cannot be heard: the thread of the connections has failed")
            raise

    def _relay(self) -> None:
        while True:
            with self.changed:
                self._watch_links()
                if self._state.is_ending and not self._has_unsent():
                    self._close_own()
                    return
            ready = self._selector.select(LOOK_S)
            with self.changed:
                for key, mask in ready:
                    self._handle(key.data, mask)
                self._deliver_ends()

    def _close_own(self) -> None:
        """Close all but the seats' connections."""
        for stranger in self._state.strangers:
            stranger.link.close()
        for channel in self._state.channels.values():
            channel.close()
        self._state.channels.clear()
        self._selector.close()
        for sock in (self._listener, self._wake_r, self._wake_w, self._news_r, self._news_w):
            sock.close()

    def _has_unsent(self) -> bool:
        return any(one.link.has_unsent for one in self._state.seats.values() if not one.lost)

    def _watch_links(self) -> None:
        """Have the selector watch exactly the links that are open, for what they need."""
        state = self._state
        links: dict[int, tuple[SeatLink, object]] = {}
        owners: list[SeatConnection | RankChannel] = [*state.strangers]
        owners += [seat for seat in state.seats.values() if not seat.lost]
        owners += [channel for channel in state.channels.values() if channel.is_open]
        for owner in owners:
            links[owner.link.socket.fileno()] = owner.link, owner
        for fd in [fd for fd in self._watched if self._watched[fd] != links.get(fd)]:
            del self._watched[fd]
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fd)
        for fd, (link, watcher) in links.items():
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.has_unsent else 0)
            if fd not in self._watched:
                self._watched[fd] = link, watcher
                self._selector.register(fd, events, watcher)
            elif self._selector.get_key(fd).events != events:
                self._selector.modify(fd, events, watcher)

    def _handle(self, owner: object, mask: int) -> None:
        if owner == "listener":
            self._accept()
        elif owner == "wake":
            with contextlib.suppress(BlockingIOError):
                self._wake_r.recv(4096)
        elif isinstance(owner, SeatConnection):
            if mask & selectors.EVENT_WRITE:
                owner.link.flush()
            self._read_from_seat(owner)
        elif isinstance(owner, RankChannel) and owner.is_open:
            if mask & selectors.EVENT_WRITE:
                owner.link.flush()
            self._read_from_controller(owner)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            watch_machine(sock)
            stranger = SeatConnection(SeatLink(sock), SeatDecoder(MAX_STRANGER_BYTES))
            self._state.strangers.append(stranger)

    def _read_from_seat(self, seat: SeatConnection) -> None:
        data = seat.link.receive()
        if data is None:
            return
        try:
            messages = seat.decoder.feed(data) if data else []
            for message in messages:
                self._hear(seat, message)
        except WireError as error:
            self._lose(seat, f"sent what is no message: {error}")
            return
        if not data:
            self._lose(seat, "is gone or unreachable")

    def _lose(self, seat: SeatConnection, how: str) -> None:
        seat.link.close()
        if seat in self._state.strangers:
            self._state.strangers.remove(seat)
        if seat.join is None or seat.lost:
            return
        seat.lost = f"its process under {self._launcher_name} ({seat.join.name}) {how}"
        self._end_channels_of(seat.join.rank)
        self.changed.notify_all()

    def _end_channels_of(self, seat: int) -> None:
        lost = self._state.seats[seat].lost
        for key, channel in self._state.channels.items():
            if channel.seat == seat and channel.end_report is None:
                channel.end_report = RankEnded(*key, 1, how=lost)
                channel.ended_at = time.monotonic()

    def _hear(self, seat: SeatConnection, message: SeatMessage) -> None:
        match message:
            case SeatJoin():
                self._admit(seat, message)
            case _ if seat.join is None:
                raise WireError(f"a {type(message).__name__} before it has joined")
            case ClockReply():
                self._take_clock(seat, message)
            case SeatReady():
                seat.is_ready = True
                self.changed.notify_all()
            case SeatNote(text):
                self._state.notes.append(f"rank {seat.join.rank}: {text}")
            case FromRank() | RankClosed() | RankFile() | RankActivity() | RankEnded():
                channel = self._state.channels.get((message.world, message.rank))
                if channel is not None and channel.seat == seat.join.rank:
                    channel.take(message)
            case RankStopped():
                self._tell(message.world, StopChange(message.rank, message.stopped))

    def _admit(self, seat: SeatConnection, join: SeatJoin) -> None:
        """A stranger becomes a seat, if it knows the token and its place is free."""
        is_expected = secrets.compare_digest(join.token, self.token)
        is_free = 0 <= join.rank < self.size and join.rank not in self._state.seats
        if not is_expected or not is_free or seat.join is not None:
            raise WireError("a process that does not belong to this session")
        self._state.strangers.remove(seat)
        seat.join, seat.decoder.most_bytes = join, MAX_FRAME_BYTES
        self._state.seats[join.rank] = seat
        seat.link.send(encode_seat_message(ClockAsk(time.monotonic())))

    def _take_clock(self, seat: SeatConnection, reply: ClockReply) -> None:
        now = time.monotonic()
        trip_s = now - reply.sent_s
        if trip_s < seat.best_trip_s:
            seat.best_trip_s = trip_s
            seat.clock_ahead_s = reply.here_s - (reply.sent_s + trip_s / 2)
        seat.clock_rounds += 1
        if seat.clock_rounds < CLOCK_ROUNDS:
            seat.link.send(encode_seat_message(ClockAsk(time.monotonic())))
        else:
            self.changed.notify_all()

    def _read_from_controller(self, channel: RankChannel) -> None:
        data = channel.link.receive()
        if data:
            frame = encode_seat_message(ToRank(*channel.key, data))
            self._state.seats[channel.seat].link.send(frame)
        elif data == b"":
            channel.close_link()

    def _deliver_ends(self) -> None:
        """Report the ranks that have ended, once the controller has all that they sent."""
        for key, channel in list(self._state.channels.items()):
            end_report = channel.end_report
            if end_report is None and not channel.is_forgotten:
                if channel.is_closing and not channel.link.has_unsent:
                    channel.close_link()
                continue
            is_delivered = not (channel.is_open and channel.link.has_unsent)
            is_late = time.monotonic() - channel.ended_at >= UNREAD_S
            if is_delivered or is_late or channel.is_forgotten:
                channel.close()
                del self._state.channels[key]
                if end_report is not None and not channel.is_forgotten:
                    self._tell(key[0], _process_exit(end_report))

    def _tell(self, world: int, change: ProcessExit | StopChange) -> None:
        self._state.news.setdefault(world, []).append(change)
        with contextlib.suppress(BlockingIOError):
            self._news_w.send(b"x")


def _process_exit(report: RankEnded) -> ProcessExit:
    return ProcessExit(report.rank, report.status, report.leaked_processes, report.how)
