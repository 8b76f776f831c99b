"""Buckets of bytes from rank to rank, during one step of an operation.

Theory of operation
-------------------

The messages of a step go through the coordinator. Tensors would make it the bottleneck, so they go
directly: the rank that has read a bucket connects to each rank that wants it. A connection carries
buckets in one direction:

    opening   each rank opens its listener for this exchange, under a token of its own, and sends
              the token to the coordinator, which passes it on to the ranks that will connect
    HELLO     sender -> receiver, with the proof of `authentication`; the token names the exchange
    WELCOME   receiver -> sender, with the receiver's proof; before that no bucket is sent
    BYTES     sender -> receiver: the bucket's number, and its bytes
    HANG_UP   from both, when the exchange is over

Each side knows from the shares how many buckets come from where, so nothing else is said. `run`
moves the buckets of one phase; a rank that is ahead may send buckets of the next phase, which wait
in the kernel until the receiver gets to it.

No rank ever waits for one certain other rank: each loop sends what the sockets take and receives
what they have, so no order of buckets can block it. A receiver holds at most one unfinished bucket
per sender. A sender gives up a bucket's memory when all receivers' kernels have it.

If a rank dies, its connections break here and at the coordinator; `check` raises the
coordinator's verdict within a moment, which all ranks share. Should that fail, or a rank send
nothing for the group's timeout, an error from here names the rank.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.descriptors import make_room_for
from pytest_dcp._engine.coordinate.failure import (
    CoordinationError,
    RankEndedError,
    RankSilentError,
)
from pytest_dcp._engine.coordinate.frame import START, Frame, FrameKind
from pytest_dcp._engine.coordinate.hello import BYTES, Hello, greet
from pytest_dcp._engine.coordinate.idle_connections import connect
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.peer_listener import peer_listener
from pytest_dcp.rank_names import ranks_text

TICK_S = 0.1
"""How often `check` is called while no byte moves."""
UNSIGNALLED_S = 0.005
"""The same while ranks are still to connect: another operation's thread may have accepted them."""
VERDICT_S = 5.0
"""How long to wait for the coordinator's verdict on a rank whose connection broke."""
ADDRESS_S = 5.0


class Outgoing(Protocol):
    """The buckets that this rank reads, as they become ready."""

    @property
    def is_done(self) -> bool:
        """Whether every bucket has been taken."""

    def fileno(self) -> int:
        """Readable when `take` has something to return or to raise."""

    def take(self) -> Sequence[tuple[int, memoryview]]:
        """Buckets that have been read since the last call: number and bytes. Raises the error of
        reading."""

    def release(self, number: int) -> None:
        """Take back a bucket's memory: it has been sent."""


@dataclass(slots=True)
class _Receiver:
    """A rank that gets buckets from this one."""

    connection: Connection
    proof: bytes
    """The rank's expected WELCOME."""
    is_welcome: bool = False
    waiting: deque[tuple[int, memoryview]] = field(default_factory=deque)
    sending: int | None = None
    """The bucket that its socket has not taken whole."""

    @property
    def is_idle(self) -> bool:
        return self.sending is None and not self.waiting


class ByteExchange:
    """This rank's connections to the ranks that share reads with it, for one load."""

    def __init__(self, context: OperationContext, check: Callable[[], None]) -> None:
        """check: raises when another rank is known to have failed."""
        if context.group is None:
            raise ValueError("a rank alone has nobody to exchange bytes with")
        self.rank = context.rank
        self.token = secrets.token_hex(16)
        """Names this exchange to the ranks that connect to this one."""
        self._context, self._group, self._check = context, context.group, check
        self._selector = selectors.DefaultSelector()
        self._masks: dict[int, int] = {}
        """By descriptor: the events that the selector watches."""
        self._receivers: dict[int, _Receiver] = {}
        self._senders: dict[int, Connection] = {}
        self._unsent: dict[int, int] = {}
        """By bucket: how many receivers still lack it."""
        self._broken: tuple[float, int, str] | None = None
        """When a connection broke, whose, and how."""
        self._moved_s = time.monotonic()
        """When a bucket last arrived, left or was read."""
        self._listener = peer_listener()
        self._listener.open(self._key(self.rank, self.token), BYTES)
        rendezvous.publish(self._group, self.rank)

    def _key(self, rank: int, token: str) -> str:
        return f"{rendezvous.group_key(self._group, rank)}/{token}"

    def connect(self, tokens: Mapping[int, str]) -> None:
        """Connect to the ranks that will get buckets from this one; their tokens, by rank."""
        make_room_for(2 * len(tokens))
        for rank, token in tokens.items():
            if rank in self._receivers:
                continue
            self._check()
            until_s = time.monotonic() + ADDRESS_S
            address = rendezvous.look_up(self._group, rank, until_s)
            if address is None:
                raise CoordinationError(f"rank {rank} has published no address to send bytes to")
            try:
                connection = Connection(connect(address))
            except OSError as error:
                raise CoordinationError(
                    f"rank {rank} cannot be reached from rank {self.rank} to share reads ({error}):"
                    " load with read='local' where ranks cannot connect to each other"
                ) from error
            hello = Hello(self._key(rank, token), BYTES, 0, self.rank)
            self._receivers[rank] = _Receiver(connection, greet(connection, hello, address.key()))

    def run(
        self,
        outgoing: Outgoing,
        receivers: Mapping[int, Collection[int]],
        expected: Mapping[int, int],
        deliver: Callable[[int, int, memoryview], None],
    ) -> None:
        """Move the buckets of one phase: returns when all have left, and all have arrived.

        receivers: of each bucket that this rank reads. expected: how many buckets come from each
        rank. deliver: called with the rank that read a bucket, its number, and its bytes, which
        are valid during the call; for this rank's own buckets, too.
        """
        missing = {rank: count for rank, count in expected.items() if count}
        self._moved_s = time.monotonic()
        try:
            while not self._is_done(outgoing, missing):
                self._check()
                self._admit(missing)
                self._send_ready(outgoing, receivers, deliver)
                self._receive(missing, deliver)
                self._flush_all(outgoing)
                self._raise_if_stuck(missing)
                if not self._is_done(outgoing, missing):
                    self._wait(outgoing, missing)
        finally:
            self._watch(outgoing.fileno(), 0)

    def _is_done(self, outgoing: Outgoing, missing: Mapping[int, int]) -> bool:
        idle = all(receiver.is_idle for receiver in self._receivers.values())
        return outgoing.is_done and not missing and idle

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        key = self._key(self.rank, self.token)
        self._listener.shut(key, BYTES)
        self._listener.forget(key)
        for connection in (*(one.connection for one in self._receivers.values()),
                           *self._senders.values()):  # fmt: skip
            connection.hang_up()
        self._receivers.clear()
        self._senders.clear()
        self._selector.close()

    # Accepting.

    def _admit(self, missing: Mapping[int, int]) -> None:
        """Take the connections of ranks that send."""
        if not self._absent(missing):
            return
        for arrival in self._listener.arrivals(self._key(self.rank, self.token), BYTES):
            connection, rank = arrival.connection, arrival.hello.rank
            if rank in self._senders:
                connection.close()
                continue
            connection.queue(self._listener.welcome(arrival.hello))
            connection.flush()
            self._senders[rank] = connection

    def _absent(self, missing: Mapping[int, int]) -> list[int]:
        return [rank for rank in missing if rank not in self._senders]

    # Sending.

    def _send_ready(
        self,
        outgoing: Outgoing,
        receivers: Mapping[int, Collection[int]],
        deliver: Callable[[int, int, memoryview], None],
    ) -> None:
        """Queue the buckets that have been read, and take them here."""
        for number, data in outgoing.take():
            self._moved_s = time.monotonic()
            ranks = receivers.get(number, ())
            self._unsent[number] = len(ranks) + 1
            for rank in ranks:
                self._receivers[rank].waiting.append((number, data))
                self._flush(self._receivers[rank], outgoing)
            deliver(self.rank, number, data)
            self._note_sent(number, outgoing)

    def _flush_all(self, outgoing: Outgoing) -> None:
        for rank, receiver in self._receivers.items():
            self._flush(receiver, outgoing)
            if receiver.connection.over and not receiver.is_idle:
                self._note_broken(rank, receiver.connection)

    def _flush(self, receiver: _Receiver, outgoing: Outgoing) -> None:
        """Send as much as the socket takes."""
        connection = receiver.connection
        if not receiver.is_welcome and not self._is_welcomed(receiver):
            connection.flush()
            return
        while not connection.over and connection.flush():
            if receiver.sending is not None:
                number, receiver.sending = receiver.sending, None
                self._note_sent(number, outgoing)
            if not receiver.waiting:
                return
            receiver.sending, data = receiver.waiting.popleft()
            text = receiver.sending.to_bytes(8, "little")
            connection.queue(Frame(FrameKind.BYTES, START, [text, data]))

    def _is_welcomed(self, receiver: _Receiver) -> bool:
        """Whether the receiver has proved that it is a rank of the group."""
        connection = receiver.connection
        connection.receive(one=True)
        if connection.frames:
            frame = connection.frames.popleft()
            proof = bytes(frame.segments[0]) if frame.segments else b""
            is_proof = hmac.compare_digest(proof, receiver.proof)
            receiver.is_welcome = frame.kind is FrameKind.WELCOME and is_proof
            if not receiver.is_welcome:
                connection.end_reason, connection.is_garbled = "it is no rank of the group", True
        return receiver.is_welcome

    def _note_sent(self, number: int, outgoing: Outgoing) -> None:
        """Note that one receiver, or this rank itself, has the bucket."""
        self._moved_s = time.monotonic()
        self._unsent[number] -= 1
        if not self._unsent[number]:
            del self._unsent[number]
            outgoing.release(number)

    # Receiving.

    def _receive(
        self, missing: dict[int, int], deliver: Callable[[int, int, memoryview], None]
    ) -> None:
        for rank in [rank for rank in missing if rank in self._senders]:
            connection = self._senders[rank]
            connection.receive(one=True)
            if connection.frames:
                self._moved_s = time.monotonic()
                frame = connection.frames.popleft()
                self._take_bucket(rank, frame, deliver)
                # Fresh pages would cost as much as copying the bucket.
                connection.reader.spare = getattr(frame.segments[1], "obj", None)
                missing[rank] -= 1
                if not missing[rank]:
                    del missing[rank]
            elif connection.over:
                self._note_broken(rank, connection)

    def _take_bucket(
        self, rank: int, frame: Frame, deliver: Callable[[int, int, memoryview], None]
    ) -> None:
        if frame.kind is not FrameKind.BYTES or len(frame.segments) != 2:
            raise CoordinationError(f"rank {rank} sent a {frame.kind.name} where bytes were due")
        number = int.from_bytes(frame.segments[0], "little")
        deliver(rank, number, memoryview(frame.segments[1]))

    # Waiting.

    def _wait(self, outgoing: Outgoing, missing: Mapping[int, int]) -> None:
        """Wait until something can be sent, received or taken; `check` is due soon anyway."""
        absent = self._absent(missing)
        self._watch(outgoing.fileno(), 0 if outgoing.is_done else selectors.EVENT_READ)
        self._watch(self._listener.fileno(), selectors.EVENT_READ if absent else 0)
        for rank, connection in self._senders.items():
            due = rank in missing and not connection.over and not connection.frames
            write = selectors.EVENT_WRITE if connection.pending and not connection.over else 0
            self._watch(connection.fileno(), (selectors.EVENT_READ if due else 0) | write)
        for receiver in self._receivers.values():
            self._watch(receiver.connection.fileno(), _events_of(receiver))
        self._selector.select(UNSIGNALLED_S if absent else TICK_S)

    def _watch(self, fd: int, mask: int) -> None:
        """Watch a descriptor for these events; 0: no longer."""
        before = self._masks.get(fd, 0)
        if fd < 0 or mask == before:
            return
        if not mask:
            self._selector.unregister(fd)
        elif not before:
            self._selector.register(fd, mask)
        else:
            self._selector.modify(fd, mask)
        self._masks[fd] = mask

    # Failing.

    def _note_broken(self, rank: int, connection: Connection) -> None:
        if self._broken is None:
            how = connection.end_reason or "it left"
            self._broken = time.monotonic(), rank, how

    def _raise_if_stuck(self, missing: Mapping[int, int]) -> None:
        """Raise if a rank has ended, once the coordinator had time to say so, or is silent."""
        now = time.monotonic()
        if self._broken is not None and now - self._broken[0] > VERDICT_S:
            _, rank, how = self._broken
            raise RankEndedError(f"rank {rank} ended while ranks shared their reads: {how}")
        if now - self._moved_s > self._context.timeout_s:
            slow = [rank for rank, one in self._receivers.items() if not one.is_idle]
            awaited = sorted({*missing, *slow})
            if not awaited:  # this rank still reads what it alone wants
                return
            raise RankSilentError(
                f"no byte came from or went to {ranks_text(awaited)} for "
                f"{self._context.timeout_s:g} s while ranks shared their reads"
            )


def _events_of(receiver: _Receiver) -> int:
    connection = receiver.connection
    if connection.over:
        return 0
    read = 0 if receiver.is_welcome or receiver.is_idle else selectors.EVENT_READ
    return read | (selectors.EVENT_WRITE if connection.pending else 0)
