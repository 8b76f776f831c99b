"""The coordinator's side of an operation: a connection to every peer.

It turns bytes into events, hands them to `CoordinatorState`, which has all the rules, and carries
out its actions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.admission import Admission
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.coordinator_actions import (
    CombineValues,
    Conclude,
    CoordinatorAction,
    PublishVerdict,
    ReadOn,
    SendAlert,
    SendPing,
    SendResult,
    SendVerdict,
)
from pytest_dcp._engine.coordinate.coordinator_state import CoordinatorState
from pytest_dcp._engine.coordinate.descriptors import exhaustion_error, make_room_for
from pytest_dcp._engine.coordinate.failure import Cause, capture
from pytest_dcp._engine.coordinate.frame import START, Frame, FrameKind, Head, encode, encode_alert
from pytest_dcp._engine.coordinate.hello import Arrival
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder
from pytest_dcp._engine.coordinate.payload import Payload
from pytest_dcp._engine.coordinate.peer_listener import PeerListener, peer_listener
from pytest_dcp._engine.coordinate.side import PARTING_S
from pytest_dcp._engine.coordinate.step_values import (
    Combine,
    LocalResult,
    Reduced,
    Result,
    StepVerdict,
)
from pytest_dcp._engine.coordinate.unjoined_ranks import Absences

TICK_S = 0.5
UNSIGNALLED_S = 0.005
"""Pause between checks for peers that no descriptor signals: see
PeerListener.has_unsignalled_peers."""
FULL_S = 5.0
"""How long peers may wait for this process to close other descriptors."""


@dataclass(slots=True, eq=False)
class Peer:
    """One other rank."""

    rank: int
    connection: Connection
    watched: bool = False
    """Whether the selector has its connection."""


class CoordinatorSide:
    """The coordinator's connections, for one operation."""

    def __init__(self, context: OperationContext) -> None:
        self.context = context
        self._peers: dict[int, Peer] = {}
        group = context.group
        order = CallOrder() if group is None else rendezvous.meeting_of(group).order
        self._state = CoordinatorState(context, order)
        self._head = START
        self._writing: set[Peer] = set()
        """Peers whose sockets have not taken all that is queued."""
        self._absences: Absences | None = None
        self._peer_listener: PeerListener | None = None
        self._selector: selectors.BaseSelector | None = None
        self._door_open = False
        """Whether the selector has the peer listener."""
        self._closed = False

    @property
    def _key(self) -> str:
        group = self.context.group
        return "" if group is None else rendezvous.group_key(group, self.context.coordinator)

    def join(self, head: Head) -> None:
        """Accept peers, from the first step on."""
        context, group = self.context, self.context.group
        self._head = head
        self._state.begin_step(head)
        if self._peer_listener is not None or group is None or context.size == 1:
            return
        self._peer_listener = peer_listener()
        self._peer_listener.open(self._key, context.place.kind)
        self._absences = Absences(group, self._key, self._peer_listener)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._peer_listener, selectors.EVENT_READ)
        self._door_open = True
        rendezvous.publish(group, context.coordinator)
        make_room_for(context.size - 1)

    def exchange(self, head: Head, own: LocalResult, combine: Combine) -> Result | StepVerdict:
        """Collect the local results of all ranks, and answer."""
        self._collect(own)
        actions = self._state.conclude()
        if isinstance(step := actions[-1], CombineValues):
            actions = self._state.combine(self._try_to_combine(combine, step.payloads))
        self._perform(actions)
        end = actions[-1]
        if not isinstance(end, Conclude):
            raise TypeError(f"expected the end of the step, got {end}")
        self._deliver(end.patience_s)
        return end.outcome

    def _try_to_combine(self, combine: Combine, payloads: Sequence[Payload]) -> Reduced | Cause:
        try:
            reduced = combine(payloads)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - every rank raises it
            return capture(self.context.rank, error)
        self._pump(0)  # peers that did not wait say so
        for peer in self._peers.values():
            self._hand_over(peer)
        return reduced

    def _collect(self, own: LocalResult) -> None:
        state, every_s = self._state, min(TICK_S, self.context.signs.ping_s)
        looked_s = time.monotonic()
        self._perform(state.collect(own, looked_s))
        # Messages that came during the local work still wait in the connections.
        for peer in self._peers.values():
            self._hand_over(peer)
        while state.missing:
            for peer in self._pump(every_s):
                self._hand_over(peer)
            # Not after each message: looking asks the store and probes addresses.
            if time.monotonic() - looked_s > every_s / 2:
                looked_s = time.monotonic()
                self._look_around(looked_s)

    def _look_around(self, now: float) -> None:
        end_reasons: dict[int, str] = {}
        if self._absences is not None:
            end_reasons = self._absences.find_ended(self._state.absent)
        heard_s = {rank: peer.connection.heard_s for rank, peer in self._peers.items()}
        refusal = self._read_refusal()
        self._perform(
            self._state.look_around(now, heard_s, end_reasons=end_reasons, refusal=refusal)
        )
        self._find_descriptors()
        self._ping(now)

    def _ping(self, now: float) -> None:
        connections = ((rank, peer.connection) for rank, peer in self._peers.items())
        said_s = {rank: line.said_s for rank, line in connections if not line.pending}
        self._perform(self._state.ping(now, said_s))

    def _find_descriptors(self) -> None:
        """Raise CoordinationError if this process has no descriptors left to accept peers."""
        if self._peer_listener is not None and self._peer_listener.full_for_s() > FULL_S:
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            raise exhaustion_error(error, self.context.size - 1)

    def _read_refusal(self) -> Cause | None:
        """Why a rank takes no part, from the store: it had no address to connect to."""
        group, context = self.context.group, self.context
        if group is None or self._state.is_complete:
            return None
        try:
            word = rendezvous.read_refusal(group, context.coordinator, context.place)
            return None if word is None else LocalResult.read(word).cause
        except (RuntimeError, ValueError):  # no store any more, or somebody else's word
            return None

    def _hand_over(self, peer: Peer) -> None:
        """Pass a peer's messages, or its end, to the state."""
        connection, rank = peer.connection, peer.rank
        while connection.frames:
            frame = connection.frames.popleft()
            self._perform(self._state.hear(rank, frame.kind, frame.head, _result_of(frame)))
        if connection.over:
            garbled = connection.is_garbled
            has_left, end_reason = connection.has_left, connection.end_reason
            self._perform(
                self._state.lose(rank, has_left=has_left, end_reason=end_reason, garbled=garbled)
            )

    def _perform(self, actions: Sequence[CoordinatorAction]) -> None:
        for action in actions:
            match action:
                case SendAlert(ranks, text):
                    self._send(ranks, Frame(FrameKind.ALERT, START, encode_alert(text)))
                case SendResult(ranks, payload):
                    self._queue(ranks, Frame(FrameKind.RESULT, self._head, payload))
                case SendVerdict(ranks, verdict):
                    self._queue(ranks, verdict.frame(self._head))
                case SendPing(rank):
                    self._send((rank,), Frame(FrameKind.PING))
                case ReadOn(rank):
                    self._peers[rank].connection.receive()
                case PublishVerdict(verdict):
                    self._publish_final_verdict(verdict)
                case CombineValues() | Conclude():
                    pass  # for `exchange`

    def _queue(self, ranks: Iterable[int], frame: Frame) -> None:
        pieces = encode(frame)
        for rank in ranks:
            self._peers[rank].connection.queue_encoded(pieces)

    def _send(self, ranks: Sequence[int], frame: Frame) -> None:
        self._queue(ranks, frame)
        for rank in ranks:
            self._flush(self._peers[rank])

    def _deliver(self, patience_s: float) -> None:
        """Send queued bytes; a peer that does not take them counts as silent in the next step."""
        until_s = time.monotonic() + patience_s
        # All sockets are filled as they empty, so a slow peer delays no other.
        for peer in self._peers.values():
            self._flush(peer)
        while self._writing:
            if time.monotonic() > until_s:
                break
            self._pump(min(TICK_S, self.context.signs.ping_s))
        self._state.note_undelivered(peer.rank for peer in self._writing)

    # Lines.

    def _pump(self, timeout_s: float) -> list[Peer]:
        """Wait for peers, at most this long. Returns the peers that joined, sent bytes or ended."""
        if self._selector is None or self._peer_listener is None:
            return []
        newcomers = self._admit_peers()
        all_here = self._state.is_complete
        # Connections in their handshake do not wake this selector: look again soon.
        if not all_here and self._peer_listener.has_unsignalled_peers():
            timeout_s = min(timeout_s, UNSIGNALLED_S)
        # A newcomer's messages may have been read with its HELLO: no event will report them.
        wait_s = 0.0 if newcomers else timeout_s
        moved = list(newcomers)
        for key, _ in self._selector.select(wait_s):
            peer: Peer | None = key.data
            if peer is not None:
                # One frame at a time: the selector reports the rest again, without a system call
                # that finds nothing.
                peer.connection.receive(one=True)
                if peer in self._writing or peer.connection.over:
                    self._flush(peer)
                moved.append(peer)
        return moved

    def _admit_peers(self) -> list[Peer]:
        """Accept peers that have connected; peers of a later operation wait."""
        if self._peer_listener is None or self._state.is_complete:
            self._stop_accepting()
            return []
        later: list[Arrival] = []
        joined: list[Peer] = []
        for arrival in self._peer_listener.arrivals(self._key, self.context.place.kind):
            hello, connection = arrival.hello, arrival.connection
            connection.receive()
            waited_s = time.monotonic() - arrival.came_s
            answer = self._state.receive_hello(
                hello, has_left=connection.has_left, waited_s=waited_s
            )
            # No rank of this group.
            if answer is None:
                connection.close()
            elif isinstance(answer, StepVerdict):
                # This rank left that operation: the peer gets the verdict that the others got.
                connection.queue(self._peer_listener.welcome(hello))
                connection.queue(answer.frame(START))
                self._peer_listener.keep(hello.group, hello.rank, connection)
            elif answer is Admission.STALE:
                self._peer_listener.keep(self._key, hello.rank, connection)
            elif answer is Admission.LATER:
                later.append(arrival)
            else:
                joined.append(self._join_peer(arrival, answer))
        self._peer_listener.give_back(later)
        return joined

    def _stop_accepting(self) -> None:
        """Stop accepting: every peer has joined, and later ones belong to later operations."""
        if self._door_open and self._selector is not None and self._peer_listener is not None:
            self._door_open = False
            self._selector.unregister(self._peer_listener)

    def _join_peer(self, arrival: Arrival, verdict: Admission) -> Peer:
        hello = arrival.hello
        peer = self._peers[hello.rank] = Peer(hello.rank, arrival.connection)
        if self._peer_listener is not None and self._selector is not None:
            peer.connection.queue(self._peer_listener.welcome(hello))
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
            peer.watched = True
            self._flush(peer)
        self._perform(self._state.join(hello, verdict))
        return peer

    def _flush(self, peer: Peer) -> None:
        """Send as much as possible, and register the selector for the events still needed."""
        all_sent = peer.connection.flush()
        if self._selector is None or not peer.watched:
            return
        if peer.connection.over:
            # Nothing more can come, and the selector would report the end again and again.
            self._selector.unregister(peer.connection)
            self._writing.discard(peer)
            peer.watched = False
        elif all_sent and peer in self._writing:
            self._writing.remove(peer)
            self._selector.modify(peer.connection, selectors.EVENT_READ, peer)
        elif not all_sent and peer not in self._writing:
            self._writing.add(peer)
            self._selector.modify(
                peer.connection, selectors.EVENT_READ | selectors.EVENT_WRITE, peer
            )

    # Failures outside of the exchange.

    def trouble(self) -> str | None:
        """A failure that a peer reported, or the end of a peer; passes it on to the others."""
        self._pump(0)
        for rank, peer in self._peers.items():
            reported_cause, connection = self._find_failure(peer), peer.connection
            text, actions = self._state.overhear(
                rank, reported_cause, over=connection.over, end_reason=connection.end_reason
            )
            self._perform(actions)
            if text is not None:
                return text
        self._ping(time.monotonic())
        return None

    def _find_failure(self, peer: Peer) -> Cause | None:
        """The failure that a peer reports in a frame that is not yet handled."""
        for frame in peer.connection.frames:
            if frame.kind is FrameKind.FAILED:
                result = _result_of(frame)
                if isinstance(result, ValueError):
                    return self.context.out_of_step(peer.rank, f"sent garbage: {result}")
                return result.cause
        return None

    def leave(self, head: Head, cause: Cause) -> None:
        """Give every peer a final verdict, to late ones within `PARTING_S`, and close."""
        if not self._closed and self._selector is not None:
            self._head = head
            self._perform(self._state.leave(head, cause, time.monotonic()))
            for peer in self._peers.values():
                self._flush(peer)
            # Stay for late peers: otherwise each would wait here until its timeout.
            while self._state.is_parting(time.monotonic(), sending=self._is_sending()):
                self._pump(PARTING_S / 20)
            self._perform(self._state.end_parting())
        self.close()

    def _is_sending(self) -> bool:
        return any(peer.connection.pending for peer in self._peers.values())

    def _publish_final_verdict(self, verdict: StepVerdict) -> None:
        group, context = self.context.group, self.context
        if group is not None:
            with contextlib.suppress(RuntimeError):  # no store any more, so the group is ending
                rendezvous.post(group, context.coordinator, context.place, verdict.frame(START))

    def close(self) -> None:
        """Say goodbye to every peer, and keep the connections for the next operation."""
        if self._closed:
            return
        self._closed = True
        if self._absences is not None:
            self._absences.close()
        if self._selector is not None and self._peer_listener is not None:
            self._selector.close()
            for peer in self._peers.values():
                self._peer_listener.keep(self._key, peer.rank, peer.connection)
            self._peer_listener.shut(self._key, self.context.place.kind)


def _result_of(frame: Frame) -> LocalResult | ValueError:
    try:
        return LocalResult.read(frame)
    except ValueError as error:
        return error
