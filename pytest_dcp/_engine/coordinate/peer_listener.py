"""Accepts the peers of this process's operations, with one listening socket per process.

Peers connect and identify themselves; `arrivals` hands each to the operation that it asks for. A
peer must first prove that it knows the group's key (see authentication), in one HELLO frame of at
most `HELLO_BYTES` and `FEW_SEGMENTS`, within `HELLO_S` after it was accepted. At most `STRANGERS`
connections without this proof are open: the next one closes the oldest. A peer whose connection is
closed this way connects again (see peer_side), so a flood of strangers delays an operation but does
not fail it.

One connection per peer serves all operations of a group. When an operation is over, `keep` takes
the connection back; it is idle until the peer says HELLO for its next operation. If an idle
connection breaks, the coordinator knows at once that the rank died between operations.

There is no thread: peers wait in the kernel's queue until the coordinator looks. A full queue makes
them wait, too: see peer_side. The socket stays open until the process ends, so that later
operations need no store and no new port.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.authentication import GroupKey, SeenNonces
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.descriptors import EXHAUSTED, make_more_room
from pytest_dcp._engine.coordinate.frame import MAX_BODY_BYTES, Frame, FrameKind
from pytest_dcp._engine.coordinate.hello import BYTES, IDLE, Address, Arrival, Hello
from pytest_dcp._engine.coordinate.machines import hosts_of, local_only, machine
from pytest_dcp._engine.coordinate.operation_order import kind_of

HELLO_BYTES = 32768
"""Room for the proof and twice the longest path."""
HELLO_S = 1.0
STRANGERS = 64
WAITING_OF_A_RANK = 64
"""Number of operations that a rank may reach before the coordinator does."""
ACCEPT_S = 0.003
"""Time to accept in one look, so that a flood does not keep the coordinator from its peers."""
BACKLOG = 4096
"""Peers that may wait while the coordinator is busy; net.core.somaxconn may lower it."""


Member = tuple[str, int]
"""A group (see rendezvous.group_key) and a rank in it."""


class PeerListener:
    """This process's listening socket, the peers that no operation has, and the idle ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listener = _listen(local_only(os.environ))
        self._selector = selectors.DefaultSelector()
        """Watches the listening socket, the handshaking and the idle connections."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._can_be_watched = hasattr(self._selector, "fileno")
        """Whether the selector can be watched itself: not select, which Windows has."""
        self._handshaking: list[tuple[float, Connection]] = []
        """Connections without a proof, and the deadline of each."""
        self._waiting: list[Arrival] = []
        self._idle: dict[Connection, Member] = {}
        self._end_reasons: dict[Member, str] = {}
        """How a member's last connection broke while it was idle."""
        self._active: Counter[tuple[str, str]] = Counter()
        self._full_s: float | None = None
        """Since when a lack of descriptors prevents accepting connections."""
        self._seen = SeenNonces()
        secret = secrets.token_hex(16)
        self._group_key = GroupKey.of(secret)
        self.address = Address(
            hosts=hosts_of(os.environ),
            port=self._listener.getsockname()[1],
            machine=machine(),
            secret=secret,
            check=self._group_key.check(),
        )

    def welcome(self, hello: Hello) -> Frame:
        """The first frame to a peer: it proves that this is the coordinator."""
        return Frame(FrameKind.WELCOME, segments=[self._group_key.welcome(hello.nonce)])

    def fileno(self) -> int:
        """A descriptor for a selector: readable when a peer has arrived or gone."""
        if self._can_be_watched:
            return self._selector.fileno()
        return self._listener.fileno()

    def open(self, group: str, kind: str) -> None:
        """Note that an operation expects peers."""
        with self._lock:
            self._active[group, kind] += 1

    def shut(self, group: str, kind: str) -> None:
        """Note that the operation expects no more peers."""
        with self._lock:
            self._active[group, kind] -= 1
            self._active += Counter()  # drops values that are not positive

    def has_unsignalled_peers(self) -> bool:
        """Whether peers may arrive without the descriptor becoming readable."""
        if not self._can_be_watched:
            return True
        return bool(self._handshaking) or self._active.total() > 1

    def arrivals(self, group: str, kind: str) -> list[Arrival]:
        """A group's peers that run this kind of operation, or a kind that does not run here."""
        with self._lock:
            self._handle_events()
            mine: list[Arrival] = []
            others: list[Arrival] = []
            for arrival in self._waiting:
                operation = (arrival.hello.group, kind_of(arrival.hello.operation))
                is_mine = operation[0] == group and (
                    operation[1] == kind or not self._active[operation]
                )
                (mine if is_mine else others).append(arrival)
            self._waiting = others
        return mine

    def broken_connection(self, group: str, rank: int) -> str | None:
        """How the process of a rank ended, as far as its idle connection shows."""
        return self._end_reasons.get((group, rank))

    def full_for_s(self) -> float:
        """For how long a lack of descriptors has prevented accepting connections."""
        return 0.0 if self._full_s is None else time.monotonic() - self._full_s

    def give_back(self, arrivals: Sequence[Arrival]) -> None:
        """Keep peers for a later operation."""
        with self._lock:
            self._waiting.extend(arrivals)

    def keep(self, group: str, rank: int, connection: Connection) -> None:
        """Leave the operation of a peer's connection, and wait for the peer's next message."""
        connection.finish()
        with self._lock:
            self._add_idle((group, rank), connection)

    def forget(self, group: str) -> None:
        """Close the connections of a group that is gone."""
        with self._lock:
            for arrival in [one for one in self._waiting if one.hello.group == group]:
                self._waiting.remove(arrival)
                arrival.connection.hang_up()
            for connection in [
                connection for connection, member in self._idle.items() if member[0] == group
            ]:
                self._drop_idle(connection)
                connection.hang_up()
            for member in [member for member in self._end_reasons if member[0] == group]:
                del self._end_reasons[member]

    def _handle_events(self) -> None:
        """Read received bytes of idle connections; then accept and greet new ones."""
        self._watch_listener()
        knocks = False
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                knocks = True
            elif (member := self._idle.get(key.data)) is not None:
                self._read_idle(key.data, member)
        if knocks:
            self._accept()
        if self._handshaking:
            self._greet()

    def _watch_listener(self) -> None:
        if self._listener not in self._selector.get_map():
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        until_s = time.monotonic() + ACCEPT_S
        for n in itertools.count(1):
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                # The queue is empty, or the peer is gone already, or there are no descriptors.
                self._note_full(error)
                return
            connection = Connection(sock)
            connection.reader.limit_bytes, connection.reader.only = HELLO_BYTES, FrameKind.HELLO
            self._selector.register(connection, selectors.EVENT_READ, connection)
            self._handshaking.append((time.monotonic() + HELLO_S, connection))
            if n % STRANGERS == 0:
                self._greet()
            while len(self._handshaking) > STRANGERS:
                self._close_stranger(self._handshaking.pop(0)[1])
            if time.monotonic() > until_s:
                return

    def _note_full(self, error: OSError) -> None:
        """Note whether a lack of descriptors keeps peers in the kernel's queue."""
        if error.errno not in EXHAUSTED:
            self._full_s = None
        elif not make_more_room():
            self._full_s = self._full_s or time.monotonic()
            # Unwatched until the next look: it would wake the operation all the time.
            self._selector.unregister(self._listener)

    def _greet(self) -> None:
        staying = []
        waiting_counts = self._count_waiting()
        for until_s, connection in self._handshaking:
            connection.receive(one=True)
            refused = bool(connection.frames)
            hello = self._read_hello(connection.frames.popleft()) if connection.frames else None
            if hello is not None and (seals := self._group_key.seals(hello.nonce)) is not None:
                connection.seal(outgoing=seals[1], incoming=seals[0])
            if hello is not None and waiting_counts[hello.group, hello.rank] >= WAITING_OF_A_RANK:
                self._close_stranger(connection)
            elif hello is not None:
                waiting_counts[hello.group, hello.rank] += 1
                connection.reader.limit_bytes, connection.reader.only = MAX_BODY_BYTES, None
                self._note_arrival(hello, connection)
            elif refused or connection.over or time.monotonic() > until_s:
                self._close_stranger(connection)
            else:
                staying.append((until_s, connection))
        self._handshaking = staying

    def _close_stranger(self, connection: Connection) -> None:
        if connection.fileno() >= 0:
            self._selector.unregister(connection)
            connection.close()

    def _note_arrival(self, hello: Hello, connection: Connection) -> None:
        """Note that a peer is here, and for which operation."""
        self._end_reasons.pop((hello.group, hello.rank), None)
        if hello.operation == BYTES and not self._active[hello.group, BYTES]:
            # Its exchange is over, and no other one will ever ask for it.
            self._close_stranger(connection)
        elif hello.operation != IDLE:
            self._selector.unregister(connection)
            self._waiting.append(Arrival(hello, connection))
        else:
            self._idle[connection] = (hello.group, hello.rank)

    def _read_idle(self, connection: Connection, member: Member) -> None:
        """Take the next HELLO of a peer whose connection is idle, or note that it ended."""
        if connection.pending and connection.flush():
            self._selector.modify(connection, selectors.EVENT_READ, connection)
        connection.receive(one=True)
        if connection.frames:
            hello = self._read_hello(connection.frames.popleft())
            if hello is not None and (hello.group, hello.rank) == member:
                del self._idle[connection]
                self._note_arrival(hello, connection)
                return
            connection.end_reason = "it sent something else than its next operation"
        if connection.over:
            self._drop_idle(connection)
            if connection.end_reason is not None:
                self._end_reasons[member] = connection.end_reason
            connection.close()

    def _add_idle(self, member: Member, connection: Connection) -> None:
        if connection.closed or connection.fileno() < 0:
            if connection.end_reason is not None:
                self._end_reasons[member] = connection.end_reason
            connection.close()
            return
        self._idle[connection] = member
        write = selectors.EVENT_WRITE if connection.pending else 0
        self._selector.register(connection, selectors.EVENT_READ | write, connection)

    def _drop_idle(self, connection: Connection) -> None:
        del self._idle[connection]
        self._selector.unregister(connection)

    def _count_waiting(self) -> Counter[Member]:
        """How many connections of each rank wait here for an operation."""
        waiting = Counter((arrival.hello.group, arrival.hello.rank) for arrival in self._waiting)
        return waiting + Counter(self._idle.values())

    def _read_hello(self, frame: Frame) -> Hello | None:
        """The peer's HELLO; None if it does not prove that it is a rank of the group."""
        if frame.kind is not FrameKind.HELLO or len(frame.segments) != 2:
            return None
        received_proof, text = frame.segments[0], bytes(frame.segments[1])
        if not self._group_key.is_proof(received_proof, text):
            return None
        try:
            facts = json.loads(text)
            subject = facts.get("subject")
            hello = Hello(**facts | {"subject": None if subject is None else tuple(subject)})
        except (ValueError, TypeError, AttributeError, RecursionError):
            return None
        return hello if hello.is_whole() and self._seen.take(hello.nonce) else None

    def close(self) -> None:
        """Close every socket; for the end of the process."""
        self._listener.close()
        self._selector.close()
        waiting = [connection for _, connection in self._handshaking] + [
            a.connection for a in self._waiting
        ]
        for connection in [*waiting, *self._idle]:
            connection.close()


_peer_listener: PeerListener | None = None
_making = threading.Lock()


def peer_listener() -> PeerListener:
    """This process's listener, opened at the first call."""
    global _peer_listener
    with _making:
        if _peer_listener is None:
            _peer_listener = PeerListener()
            atexit.register(_peer_listener.close)
        return _peer_listener


def _forget_in_child() -> None:
    """A forked child has no peers; its copy of the socket would keep a dead parent's port open."""
    global _peer_listener, _making
    _making = threading.Lock()
    if _peer_listener is not None:
        atexit.unregister(_peer_listener.close)
        with contextlib.suppress(OSError):
            _peer_listener._listener.close()
            # The child shares the kernel's list of watched sockets with the parent: do not change
            # it.
            _peer_listener._selector.close()
        _peer_listener = None


operating_system.call_in_forked_children(_forget_in_child)


def _listen(loopback: bool) -> socket.socket:
    if loopback:
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    else:
        try:
            listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        except (OSError, ValueError):  # no IPv6 here
            listener = socket.create_server(("", 0), backlog=BACKLOG)
    listener.setblocking(False)
    return listener
