"""The coordinator's side of an operation: a connection to every peer.

An exchange collects one local result of each rank, combines, and answers. A rank that ends,
leaves, is silent for the timeout or is out of step fails the step and makes its verdict final. As
soon as the first failure is known the others are alerted, so that busy ones can stop; the verdict
waits until every rank has stated how its work ended, so that no rank writes on when it is given.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import time
from collections.abc import Iterable
from dataclasses import dataclass

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.absence import Absences
from pytest_dcp._engine.coordinate.admission import Admission, admit, difference
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.descriptors import exhaustion_error, make_room_for
from pytest_dcp._engine.coordinate.failure import Cause, capture
from pytest_dcp._engine.coordinate.frame import START, Frame, FrameKind, Head, encode, encode_alert
from pytest_dcp._engine.coordinate.hello import Arrival
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.peer_listener import PeerListener, peer_listener
from pytest_dcp._engine.coordinate.sequence import CallOrder
from pytest_dcp._engine.coordinate.side import PARTING_S
from pytest_dcp._engine.coordinate.step_values import (
    Combine,
    LocalResult,
    Reduced,
    Result,
    StepVerdict,
)

TICK_S = 0.5
UNSIGNALLED_S = 0.005
"""Between looks for peers that no descriptor announces: see PeerListener.has_unsignalled_peers."""
FULL_S = 5.0
"""How long peers may wait for this process to close descriptors that it has open elsewhere."""
FINAL_S = 2.0
"""How long a final verdict waits for peers to take it; it stays in their sockets anyway."""


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
        self._stuck: dict[int, Cause] = {}
        """Ranks with which no further step is possible."""
        self._local_results: dict[int, LocalResult] = {}
        self._missing: set[int] = set()
        """Ranks that have not stated how this step's work ended, and still can."""
        self._writing: set[Peer] = set()
        """Peers whose sockets have not taken all that is queued."""
        self._alert_text: str | None = None
        """What this step's peers have been told to stop for."""
        self._absences: Absences | None = None
        self._epochs: set[int] = set()
        """Of peers whose numbers do not match."""
        self._peer_listener: PeerListener | None = None
        self._selector: selectors.BaseSelector | None = None
        self._door_open = False
        """Whether the selector has the peer listener."""
        self._closed = False

    @property
    def _key(self) -> str:
        group = self.context.group
        return "" if group is None else rendezvous.group_key(group, self.context.coordinator)

    @property
    def _order(self) -> CallOrder:
        group = self.context.group
        return CallOrder() if group is None else rendezvous.meeting_of(group).order

    def join(self, head: Head) -> None:
        """Be there for the peers, from the first step on."""
        context, group = self.context, self.context.group
        self._alert_text = None
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
        self._collect(head, own)
        causes = self._causes()
        replies: Reduced | None = None
        if not causes:
            try:
                payloads = [self._local_results[rank].payload for rank in range(self.context.size)]
                replies = combine(payloads)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001 - whatever it is, every rank raises it
                causes = [capture(self.context.rank, error)]
        causes = causes or self._given_up(head)
        if replies is None or causes:
            return self._fail_step(head, causes)
        shared = None if replies.apart else encode(Frame(FrameKind.RESULT, head, replies.shared))
        for peer in self._peers.values():
            frame = shared or encode(Frame(FrameKind.RESULT, head, replies.payload(peer.rank)))
            peer.connection.queue_encoded(frame)
        self._deliver(head, self.context.timeout_s)
        return Result(value=replies.own)

    def _given_up(self, head: Head) -> list[Cause]:
        """Why the step failed for peers that did not wait while this rank combined."""
        self._pump(0)
        impatient = [peer for peer in self._peers.values() if self._find_failure(peer) is not None]
        for peer in impatient:
            self._take(peer, head)
        return self._causes() if impatient else []

    # Local results.

    def _collect(self, head: Head, own: LocalResult) -> None:
        context, since_s = self.context, time.monotonic()
        self._local_results = {context.rank: own}
        self._missing = set(range(context.size)) - {context.rank} - self._stuck.keys()
        if own.cause is not None and not own.echo:
            self._alert(own.cause)
        for peer in self._peers.values():
            self._take(peer, head)
        looked_s = since_s
        while self._missing:
            for peer in self._pump(min(TICK_S, context.ping_s)):
                self._take(peer, head)
            now = time.monotonic()
            if now - looked_s > min(TICK_S, context.ping_s) / 2:
                looked_s = now
                self._find_dead(head)
                self._find_silent(head, since_s)
                self._find_dropped()
                self._find_descriptors()
                self._ping()

    def _find_descriptors(self) -> None:
        """Raise CoordinationError when the peers cannot be accepted for want of descriptors."""
        if self._peer_listener is not None and self._peer_listener.full_for_s() > FULL_S:
            error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            raise exhaustion_error(error, self.context.size - 1)

    def _take(self, peer: Peer, head: Head) -> None:
        """Read what a peer says of this step."""
        connection, context = peer.connection, self.context
        while connection.frames:
            frame = connection.frames.popleft()
            if frame.kind is not FrameKind.FAILED and frame.head != head:
                text = f"is in step {frame.head} where the coordinator is in {head}"
                self._give_up(context.out_of_step(peer.rank, text))
                return
            try:
                result = self._local_results[peer.rank] = LocalResult.read(frame)
            except ValueError as error:
                self._give_up(context.out_of_step(peer.rank, f"sent garbage: {error}"))
                return
            self._missing.discard(peer.rank)
            if result.cause is not None:
                connection.receive()  # it may leave for good with this
            if result.cause is not None and not result.echo:
                self._alert(result.cause)
        if connection.over:
            stated = self._local_results.get(peer.rank)
            if stated is not None and stated.cause is not None and not stated.echo:
                self._give_up(stated.cause)
            elif connection.left:
                self._give_up(context.left(peer.rank, head.name))
            else:
                self._give_up(context.ended(peer.rank, head.name, connection.ended or ""))

    def _find_dead(self, head: Head) -> None:
        """Notice ranks that ended before they came to this operation."""
        if self._absences is not None:
            missing = sorted(self._missing - self._peers.keys())
            for rank, how in self._absences.find_ended(missing).items():
                self._give_up(self.context.ended(rank, head.name, how))
        if (refusal := self._refusal()) is not None:
            self._give_up(refusal)

    def _refusal(self) -> Cause | None:
        """Why a rank takes no part, if it could not say so here: there was no address yet."""
        group, context = self.context.group, self.context
        if group is None or len(self._peers) + 1 == context.size:
            return None
        try:
            word = rendezvous.read_refusal(group, context.coordinator, context.place)
            return None if word is None else LocalResult.read(word).cause
        except (RuntimeError, ValueError):  # no store any more, or somebody else's word
            return None

    def _find_silent(self, head: Head, since_s: float) -> None:
        now = time.monotonic()
        for rank in sorted(self._missing):
            peer = self._peers.get(rank)
            heard_s = max(since_s, peer.connection.heard_s) if peer is not None else since_s
            if now - heard_s > self.context.timeout_s:
                self._give_up(self.context.silent(rank, head.name))

    def _find_dropped(self) -> None:
        """Wait for no newcomers once the ranks began to count anew: they have dropped it, too."""
        context = self.context
        if context.group is not None and self._order.is_dropped(context.place):
            for rank in sorted(self._missing - self._peers.keys()):
                text = f"went out of step before it came to {context.operation}"
                self._give_up(context.out_of_step(rank, text))

    def _ping(self) -> None:
        now = time.monotonic()
        for peer in self._peers.values():
            if not peer.connection.pending and now - peer.connection.said_s > self.context.ping_s:
                peer.connection.queue(Frame(FrameKind.PING))
                self._flush(peer)

    def _give_up(self, cause: Cause) -> None:
        self._stuck.setdefault(cause.rank, cause)
        self._missing.discard(cause.rank)
        self._alert(cause)

    def _alert(self, cause: Cause) -> None:
        """Tell the ranks that are still busy, once per step."""
        if self._alert_text is None:
            self._alert_text = cause.summary()
            for peer in self._peers.values():
                self._pass_on(peer, self._alert_text)

    def _pass_on(self, peer: Peer, text: str) -> None:
        peer.connection.queue(Frame(FrameKind.ALERT, START, encode_alert(text)))
        self._flush(peer)

    def _causes(self) -> list[Cause]:
        """Why the step failed, one cause per rank; echoes only when there is nothing else."""
        stated = {rank: s for rank, s in self._local_results.items() if s.cause is not None}
        told = [s.cause for s in stated.values() if s.cause is not None and not s.echo]
        # Peers that have given up on this rank say so of it.
        found = {cause.rank: cause for cause in told} | self._stuck
        causes = [cause for _, cause in sorted(found.items())]
        return causes or [s.cause for s in stated.values() if s.cause is not None]

    # Answers.

    def _fail_step(self, head: Head, causes: list[Cause]) -> StepVerdict:
        final = bool(self._stuck)
        verdict = StepVerdict(head.name, causes, final, self._new_epoch())
        if verdict.epoch:
            self._order.restart(verdict.epoch, causes)
        # A peer whose connection ended for garbage may not have heard that it was let in.
        unheard = any(peer.connection.is_garbled for peer in self._peers.values())
        if final and (unheard or len(self._peers) + 1 < self.context.size):
            self._publish_final_verdict(verdict)
        pieces = encode(verdict.frame(head))
        for peer in self._peers.values():
            peer.connection.queue_encoded(pieces)
        self._deliver(head, FINAL_S if final else self.context.timeout_s)
        return verdict

    def _new_epoch(self) -> int:
        """The epoch that a verdict begins; 0 where the ranks' numbers match."""
        return 1 + max(self._epochs) if self._epochs else 0

    def _deliver(self, head: Head, patience_s: float) -> None:
        """Send what is queued; a peer that does not take it is silent in the next step."""
        until_s = time.monotonic() + patience_s
        for peer in self._peers.values():
            self._flush(peer)
        while self._writing:
            if time.monotonic() > until_s:
                break
            self._pump(min(TICK_S, self.context.ping_s))
        for peer in self._writing:
            self._stuck.setdefault(peer.rank, self.context.silent(peer.rank, head.name))

    # Lines.

    def _pump(self, timeout_s: float) -> list[Peer]:
        """Wait for peers, at most so long; those that came, spoke or ended."""
        if self._selector is None or self._peer_listener is None:
            return []
        newcomers = self._let_in()
        all_here = len(self._peers) + 1 == self.context.size
        if not all_here and self._peer_listener.has_unsignalled_peers():
            timeout_s = min(timeout_s, UNSIGNALLED_S)
        wait_s = 0.0 if newcomers else timeout_s
        moved = list(newcomers)
        for key, _ in self._selector.select(wait_s):
            peer: Peer | None = key.data
            if peer is not None:
                # The selector tells again of what is left: no call of the system to find nothing.
                peer.connection.receive(one=True)
                if peer in self._writing or peer.connection.over:
                    self._flush(peer)
                moved.append(peer)
        return moved

    def _let_in(self) -> list[Peer]:
        """Take in the peers that have come; those who come for a later operation wait."""
        if self._peer_listener is None or len(self._peers) + 1 == self.context.size:
            self._close_door()
            return []
        later: list[Arrival] = []
        joined: list[Peer] = []
        for arrival in self._peer_listener.arrivals(self._key, self.context.place.kind):
            if not self._is_of_another_rank(arrival):
                arrival.connection.close()
                continue
            if self._answer_late(arrival):
                continue
            verdict = self._admit(arrival)
            if verdict is Admission.STALE:
                self._peer_listener.keep(self._key, arrival.hello.rank, arrival.connection)
            elif verdict is Admission.LATER:
                later.append(arrival)
            else:
                joined.append(self._join_peer(arrival, verdict))
        self._peer_listener.give_back(later)
        return joined

    def _answer_late(self, arrival: Arrival) -> bool:
        """Send a peer away that comes to an operation which this rank has left; whether it did."""
        hello, connection = arrival.hello, arrival.connection
        known = self._order.find_verdict(hello.epoch, hello.number)
        if known is None or self._peer_listener is None:
            return False
        connection.queue(self._peer_listener.welcome(hello))
        connection.queue(known.frame(START))
        self._peer_listener.keep(hello.group, hello.rank, connection)
        return True

    def _is_of_another_rank(self, arrival: Arrival) -> bool:
        rank = arrival.hello.rank
        return 0 <= rank < self.context.size and rank != self.context.rank

    def _admit(self, arrival: Arrival) -> Admission:
        """Whether a peer comes for this operation."""
        hello, connection = arrival.hello, arrival.connection
        connection.receive()
        waited_s = time.monotonic() - arrival.came_s
        verdict = admit(
            hello, self.context.place, self._order, left=connection.left, waited_s=waited_s
        )
        taken = hello.rank in self._peers and verdict is not Admission.STALE
        return Admission.LATER if taken else verdict

    def _close_door(self) -> None:
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
        if self._alert_text is not None:
            self._pass_on(peer, self._alert_text)
        if verdict is Admission.OUT_OF_COUNT:
            self._epochs |= {hello.epoch, self.context.place.epoch}
        if (text := difference(hello, self.context, verdict)) is not None:
            self._give_up(self.context.out_of_step(hello.rank, text))
        return peer

    def _flush(self, peer: Peer) -> None:
        """Send what goes, and have the selector wait for what is still of interest."""
        done = peer.connection.flush()
        if self._selector is None or not peer.watched:
            return
        if peer.connection.over:
            self._selector.unregister(peer.connection)
            self._writing.discard(peer)
            peer.watched = False
        elif done and peer in self._writing:
            self._writing.remove(peer)
            self._selector.modify(peer.connection, selectors.EVENT_READ, peer)
        elif not done and peer not in self._writing:
            self._writing.add(peer)
            self._selector.modify(
                peer.connection, selectors.EVENT_READ | selectors.EVENT_WRITE, peer
            )

    # Failures outside of the exchange.

    def trouble(self) -> str | None:
        """What a peer has told of, or that it is gone; passes it on to the others."""
        self._pump(0)
        for peer in self._peers.values():
            cause = self._stuck.get(peer.rank) or self._find_failure(peer)
            if cause is None and peer.connection.over:
                cause = self.context.ended(
                    peer.rank, "its work", peer.connection.ended or "it left"
                )
            if cause is not None:
                self._alert(cause)
                return cause.summary()
        self._ping()
        return None

    def _find_failure(self, peer: Peer) -> Cause | None:
        """The failure that a peer has told of, in a frame that is not taken yet."""
        for frame in peer.connection.frames:
            if frame.kind is FrameKind.FAILED:
                try:
                    return LocalResult.read(frame).cause
                except ValueError as error:
                    return self.context.out_of_step(peer.rank, f"sent garbage: {error}")
        return None

    def leave(self, head: Head, cause: Cause) -> None:
        """Give every peer a final verdict, to late ones within `PARTING_S`, and close."""
        # Before the first step peers may come at any time: a word is left for them.
        until_s = time.monotonic() + (PARTING_S if head.number else 0.0)
        pieces = encode(StepVerdict(head.name, [cause], True, self._new_epoch()).frame(head))
        told: set[int] = set()
        while not self._closed and self._selector is not None:
            for peer in self._untold(told):
                peer.connection.queue_encoded(pieces)
                self._flush(peer)
            waiting = any(p.connection.pending for p in self._peers.values())
            if time.monotonic() > until_s or (len(told) + 1 == self.context.size and not waiting):
                break
            self._pump(PARTING_S / 20)
        if self._selector is not None and not self._closed and len(told) + 1 < self.context.size:
            verdict = StepVerdict(head.name, [cause], True, self._new_epoch())
            self._order.note_left(self.context.place, verdict)
            self._publish_final_verdict(verdict)
        self.close()

    def _publish_final_verdict(self, verdict: StepVerdict) -> None:
        group, context = self.context.group, self.context
        if group is not None:
            with contextlib.suppress(RuntimeError):  # no store any more, so the group is ending
                rendezvous.post(group, context.coordinator, context.place, verdict.frame(START))

    def _untold(self, told: set[int]) -> Iterable[Peer]:
        for peer in [peer for rank, peer in self._peers.items() if rank not in told]:
            told.add(peer.rank)
            yield peer

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
