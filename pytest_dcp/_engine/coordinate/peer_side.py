"""A peer's side of an operation: one connection to the coordinator.

The peer says hello before its first step's work, so that the coordinator notices its end from then
on. It waits as long as the coordinator shows signs of life; a coordinator in long work of its own
may be silent for the timeout and a margin.
"""

from __future__ import annotations

import contextlib
import hmac
import time

import torch.distributed as dist

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.authentication import SHARED_KEY
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.failure import Cause, CoordinationError, capture
from pytest_dcp._engine.coordinate.frame import START, Frame, FrameKind, Head
from pytest_dcp._engine.coordinate.hello import greet
from pytest_dcp._engine.coordinate.idle_connections import (
    GONE,
    Link,
    connect,
    keep_connection,
    take_idle,
)
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.payload import Payload
from pytest_dcp._engine.coordinate.peer_state import (
    AGAIN_S,
    ExplainEnd,
    Finish,
    LinkState,
    LookForVerdict,
    PeerAction,
    PeerState,
    Reconnect,
)
from pytest_dcp._engine.coordinate.side import PARTING_S
from pytest_dcp._engine.coordinate.step_values import Combine, LocalResult, Result, StepVerdict
from pytest_dcp._engine.coordinate.unjoined_ranks import Absence

UNREACHED_S = 60.0
"""How long to retry while the network leads to none of the coordinator's addresses."""
REFUSED_S = 0.5
"""How long to look for the address of a restarted coordinator after the old one refuses."""
TICK_S = 0.5
"""Longest single wait, so that signals are handled soon on every Python."""


class PeerSide:
    """A peer's connection to the coordinator, for one operation."""

    def __init__(self, context: OperationContext) -> None:
        self.context = context
        self._link: Link | None = None
        self._answer = b""
        """The proof expected from the coordinator."""
        self._state: PeerState | None = None
        """From the first hello on."""
        self._keeps_connection = False

    @property
    def _group(self) -> dist.ProcessGroup:
        if self.context.group is None:
            raise ValueError(f"rank {self.context.rank} has no group to meet its coordinator in")
        return self.context.group

    def join(self, head: Head) -> StepVerdict | None:
        """Say hello, at the first step; a verdict if there is no coordinator."""
        if self._link is not None:
            return None
        context = self.context
        found: Link | Cause | None = take_idle(self._group, context.coordinator)
        if found is None:
            try:
                until_s = time.monotonic() + context.timeout_s + context.signs.margin_s
                found = self._find(until_s, head.name)
            except RuntimeError as error:  # of the store
                found = context.ended(context.coordinator, head.name, f"its store: {error}")
        if isinstance(found, Cause):
            return StepVerdict(head.name, [found], final=True)
        if found.address.check != found.address.key().check():
            found.connection.hang_up()
            cause = capture(context.rank, _other_key(context.rank))
            return StepVerdict(head.name, [cause], final=True)
        self._say_hello(found)
        return None

    def _say_hello(self, link: Link) -> None:
        if self._state is None:
            order = rendezvous.meeting_of(self._group).order
            self._state = PeerState(self.context, order, time.monotonic())
        self._link = link
        group_key = rendezvous.group_key(self._group, self.context.coordinator)
        hello = self._state.make_hello(group_key, time.monotonic())
        self._answer = greet(link.connection, hello, link.address.key())

    def _find(self, until_s: float, step: str) -> Link | Cause:
        """A new connection, or the reason that it cannot be made.

        Waits for a coordinator that is missing, or whose queue is full, as for any late rank.
        """
        with contextlib.closing(Absence(self._group, self.context.coordinator)) as absence:
            return self._try_addresses(until_s, step, absence)

    def _try_addresses(self, until_s: float, step: str, absence: Absence) -> Link | Cause:
        context, group = self.context, self._group
        refused_s = unreached_s = until_s
        while True:
            now = time.monotonic()
            address = rendezvous.look_up(group, context.coordinator, min(until_s, now + TICK_S))
            if address is None:
                if (how := absence.look()) is not None:
                    return context.ended(context.coordinator, step, how)
            else:
                try:
                    return Link(Connection(connect(address)), address)
                # Something listens there and its queue is full: neither gone nor out of reach.
                except TimeoutError:
                    refused_s = unreached_s = until_s
                except GONE as error:
                    refused_s = min(refused_s, now + REFUSED_S)
                    if time.monotonic() > refused_s:
                        how = f"nothing answers at its address: {error}"
                        return context.ended(context.coordinator, step, how)
                    # A restarted coordinator writes another address: do not believe the one read
                    # before.
                    rendezvous.forget(group, context.coordinator)
                    time.sleep(REFUSED_S / 10)
                except OSError as error:
                    unreached_s = min(unreached_s, now + UNREACHED_S)
                    if time.monotonic() > unreached_s:
                        return context.unreached(context.coordinator, step, error)
                    time.sleep(AGAIN_S)
            if time.monotonic() > until_s:
                return context.silent(context.coordinator, step)

    def exchange(self, head: Head, own: LocalResult, combine: Combine) -> Result | StepVerdict:
        """Send the local result and wait for the result; `combine` is the coordinator's."""
        state = self._require_state()
        state.begin_wait(head, time.monotonic())
        sent_over: Connection | None = None
        while True:
            connection = self._require_connection()
            # After a reconnect the result goes out again: the old connection may have lost it.
            if sent_over is not connection:
                sent_over = connection
                connection.queue(own.frame(head))
            step: PeerAction | None = self._hear(state, connection)
            step = step or state.decide(time.monotonic(), _state_of(connection))
            if isinstance(step, ExplainEnd):
                how = rendezvous.ended_process(self._group, self.context.coordinator)
                step = state.end_step(how or step.how)
            if isinstance(step, Finish):
                return self._finish(head, step)
            if isinstance(step, Reconnect):
                self._reconnect(state, step)
            elif isinstance(step, LookForVerdict):
                if (verdict := self._read_verdict()) is not None:
                    return state.accept_verdict(verdict)
            else:
                _wait(connection, min(TICK_S, self.context.signs.ping_s))

    def _hear(self, state: PeerState, connection: Connection) -> Finish | None:
        """Send queued frames, and receive."""
        connection.flush()
        connection.receive()
        while connection.frames:
            frame = connection.frames.popleft()
            if frame.kind is FrameKind.WELCOME:
                state.hear_welcome(is_proof=self._is_proof(frame))
            elif (finish := state.hear(frame.kind, frame.head, _body_of(frame))) is not None:
                return finish
        return None

    def _finish(self, head: Head, finish: Finish) -> Result | StepVerdict:
        connection = self._require_connection()
        if finish.distrust is not None:
            connection.end_reason = finish.distrust
        if finish.farewell is not None:
            connection.queue(finish.farewell.frame(head))
        return finish.outcome

    def _reconnect(self, state: PeerState, reconnect: Reconnect) -> None:
        """Say hello on a new connection to the address now in the store."""
        connection, coordinator = self._require_connection(), self.context.coordinator
        time.sleep(max(0.0, reconnect.not_before_s - time.monotonic()))
        rendezvous.forget(self._group, coordinator)
        link, is_of_use = None, True
        try:
            address = rendezvous.look_up(self._group, coordinator, 0.0)
            link = None if address is None else Link(Connection(connect(address)), address)
            is_of_use = link is not None
        except (*GONE, RuntimeError, ValueError):
            is_of_use = False
        except OSError:  # its queue is full, or it cannot be reached just now
            pass
        state.note_reconnect(time.monotonic(), is_of_use=is_of_use)
        if link is not None:
            connection.close()
            self._say_hello(link)

    def _read_verdict(self) -> StepVerdict | None:
        """The verdict of a coordinator that left this operation before it let this rank in."""
        try:
            group, coordinator = self._group, self.context.coordinator
            frame = rendezvous.read_verdict(group, coordinator, self.context.place)
            return None if frame is None else StepVerdict.read(frame)
        except (RuntimeError, ValueError):  # the store is gone, or no rank wrote the message
            return None

    def trouble(self) -> str | None:
        """A failure that the coordinator reported, or its end; shows that this rank is alive."""
        if (
            self._link is None
            or self._keeps_connection
            or (connection := self._link.connection).fileno() < 0
        ):
            return None
        state = self._require_state()
        connection.receive()
        must_ping = self.context.signs.must_ping(time.monotonic(), said_s=connection.said_s)
        if must_ping and not connection.pending:
            connection.queue(Frame(FrameKind.PING))
        connection.flush()
        for frame in connection.frames:
            if frame.kind is FrameKind.WELCOME:
                state.hear_welcome(is_proof=self._is_proof(frame))
            elif (text := state.overhear(frame.kind, _body_of(frame))) is not None:
                return text
        step = state.decide_at_work(time.monotonic(), _state_of(connection))
        if isinstance(step, LookForVerdict):
            if (verdict := self._read_verdict()) is not None:
                return verdict.summary()
            step = state.decide_at_work(time.monotonic(), _state_of(connection))
        if isinstance(step, Reconnect):
            self._reconnect(state, step)
            if state.can_reconnect:
                return None
        if connection.over:
            name = self.context.name_of(self.context.coordinator)
            return f"{name} {connection.end_reason or 'left'}"
        return None

    def _is_proof(self, welcome: Frame) -> bool:
        received_proof = bytes(welcome.segments[0]) if welcome.segments else b""
        return hmac.compare_digest(received_proof, self._answer)

    def leave(self, head: Head, cause: Cause) -> None:
        """Tell the coordinator why, and close."""
        until_s = time.monotonic() + PARTING_S
        if self._link is None:
            self._meet_to_leave(until_s)
        if self._link is None:
            with contextlib.suppress(RuntimeError, CoordinationError):
                word = LocalResult(cause=cause).frame(START)
                rendezvous.refuse(self._group, self.context.coordinator, self.context.place, word)
        elif not self._keeps_connection and (connection := self._link.connection).fileno() >= 0:
            connection.queue(
                Frame(FrameKind.FAILED, head, LocalResult(cause=cause).frame(head).segments)
            )
            connection.finish()
            while not connection.flush() and time.monotonic() < until_s:
                _wait(connection, PARTING_S / 10)
            self._keep()

    def _meet_to_leave(self, until_s: float) -> None:
        """Connect before the first step, if the coordinator has an address by now."""
        group, coordinator = self._group, self.context.coordinator
        with contextlib.suppress(RuntimeError, OSError, CoordinationError):
            found = take_idle(group, coordinator) or self._find(until_s, START.name)
            if isinstance(found, Link):
                self._say_hello(found)

    def close(self) -> None:
        """Say goodbye, and keep the connection for the next operation."""
        if self._link is not None and not self._keeps_connection:
            self._link.connection.finish()
            self._keep()

    def _keep(self) -> None:
        if self._link is not None:
            self._keeps_connection = True
            keep_connection(self._group, self.context.coordinator, self._link)

    def _require_state(self) -> PeerState:
        if self._state is None:
            raise ValueError(
                f"{self.context.name_of(self.context.rank)} has not joined the operation"
            )
        return self._state

    def _require_connection(self) -> Connection:
        if self._link is None:
            raise ValueError(
                f"{self.context.name_of(self.context.rank)} has not joined the operation"
            )
        return self._link.connection


def _state_of(connection: Connection) -> LinkState:
    return LinkState(
        connection.heard_s,
        connection.has_left,
        connection.end_reason,
        garbled=connection.is_garbled,
    )


def _body_of(frame: Frame) -> Payload | StepVerdict | ValueError:
    if frame.kind is not FrameKind.VERDICT:
        return frame.segments
    try:
        return StepVerdict.read(frame)
    except ValueError as error:
        return error


def _other_key(rank: int) -> CoordinationError:
    return CoordinationError(
        f"rank {rank} has another {SHARED_KEY} in its environment than the coordinator: set it to "
        "the same value on every rank, or on none"
    )


def _wait(connection: Connection, timeout_s: float) -> None:
    """Wait until bytes arrive, or queued bytes can be sent; or until the time is over."""
    with contextlib.suppress(ValueError):  # closed: the caller sees it
        operating_system.wait_for_socket(
            connection.sock, max(0.001, timeout_s), to_read=True, to_write=connection.pending
        )
