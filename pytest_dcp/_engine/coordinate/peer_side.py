"""A peer's side of an operation: one connection to the coordinator.

The peer says hello before its first step's work, so that the coordinator notices its end from then
on. It waits as long as the coordinator is heard of; a coordinator in long work of its own may be
silent for the timeout and a margin.
"""

from __future__ import annotations

import contextlib
import hmac
import select
import time

import torch.distributed as dist

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.absence import Absence
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.failure import Cause, CoordinationError, capture
from pytest_dcp._engine.coordinate.frame import START, Frame, FrameKind, Head, alert_text
from pytest_dcp._engine.coordinate.handshake import SHARED_KEY
from pytest_dcp._engine.coordinate.hello import Hello, greet
from pytest_dcp._engine.coordinate.link import GONE, Link, connect, keep, take_idle
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.sequence import CallOrder
from pytest_dcp._engine.coordinate.side import PARTING_S
from pytest_dcp._engine.coordinate.step_values import Combine, LocalResult, Result, StepVerdict

UNREACHED_S = 60.0
"""How long a network that leads to none of the coordinator's addresses may take to recover."""
REFUSED_S = 0.5
"""How long a refused address may be replaced by the address of a coordinator that came anew."""
AGAIN_S = 0.2
"""Between two tries to be let in, where strangers crowd the coordinator."""
WORD_S = 0.5
"""How often a peer that is not let in looks whether the coordinator left word for it."""
TICK_S = 0.5
"""Longest single wait, so that signals are handled soon on every Python."""


class PeerSide:
    """A peer's connection to the coordinator, for one operation."""

    def __init__(self, context: OperationContext) -> None:
        self.context = context
        self._link: Link | None = None
        self._answer = b""
        """What the coordinator must show."""
        self._welcome = False
        self._met_s = 0.0
        """When this rank last said hello."""
        self._looked_s = time.monotonic()
        self._kept = False

    @property
    def _group(self) -> dist.ProcessGroup:
        if self.context.group is None:
            raise ValueError(f"rank {self.context.rank} has no group to meet its coordinator in")
        return self.context.group

    @property
    def _order(self) -> CallOrder:
        return rendezvous.meeting_of(self._group).order

    def join(self, head: Head) -> StepVerdict | None:
        """Say hello, at the first step; a verdict when no coordinator is there."""
        if self._link is not None:
            return None
        context = self.context
        found: Link | Cause | None = take_idle(self._group, context.coordinator)
        if found is None:
            try:
                until_s = time.monotonic() + context.timeout_s + context.margin_s
                found = self._find(until_s, head.name)
            except RuntimeError as error:  # of the store
                found = context.ended(context.coordinator, head.name, f"its store: {error}")
        if isinstance(found, Cause):
            return self._end(found, head)
        if found.address.check != found.address.key().check():
            found.connection.hang_up()
            return self._end(capture(context.rank, _other_key(context.rank)), head)
        self._say_hello(found)
        return None

    def _say_hello(self, link: Link) -> None:
        context, place = self.context, self.context.place
        self._met_s = time.monotonic()
        self._link = link
        hello = Hello(
            rendezvous.group_key(self._group, context.coordinator),
            context.operation,
            place.number,
            context.rank,
            place.epoch,
            self._order.finished_up_to(),
            place.unordered,
            None if place.subject is None else (place.subject.name, place.subject.real),
        )
        self._answer = greet(link.connection, hello, link.address.key())

    def _find(self, until_s: float, step: str) -> Link | Cause:
        """A new connection, or why there is none.

        A coordinator that has not come, or whose queue is full, is waited for like any late rank.
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
                except TimeoutError:
                    refused_s = unreached_s = until_s
                except GONE as error:
                    refused_s = min(refused_s, now + REFUSED_S)
                    if time.monotonic() > refused_s:
                        how = f"nobody answers at its address: {error}"
                        return context.ended(context.coordinator, step, how)
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
        connection = self._require_connection()
        connection.queue(own.frame(head))
        since_s = time.monotonic()
        while True:
            connection.flush()
            connection.receive()
            while connection.frames:
                outcome = self._judge(head, connection.frames.popleft())
                if outcome is not None:
                    return outcome
            if self._is_let_in_again(since_s):
                if connection is not self._require_connection():
                    connection = self._require_connection()
                    connection.queue(own.frame(head))
                continue
            lost = self._lost(head, since_s)
            if lost is not None:
                # All peers say the same of the coordinator, and tell it, should it come back.
                connection.queue(LocalResult(cause=lost).frame(head))
                return StepVerdict(head.name, [lost], final=True)
            if (word := self._word_left()) is not None:
                return self._obey(word)
            if not self._welcome and self._order.is_dropped(self.context.place):
                return StepVerdict(head.name, self._order.causes, final=True)
            _wait(connection, min(TICK_S, self.context.ping_s))

    def _is_let_in_again(self, since_s: float) -> bool:
        """Say hello anew where the coordinator closed the connection before it let this rank in.

        It does so when strangers crowd it. Whether to go on; False: the connection is as it was.
        """
        context = self.context
        connection = self._require_connection()
        if self._welcome or connection.ended is None or connection.is_garbled:
            return False
        if time.monotonic() - since_s > context.timeout_s + context.margin_s:
            return False
        time.sleep(max(0.0, self._met_s + AGAIN_S - time.monotonic()))
        self._met_s = time.monotonic()
        rendezvous.forget(self._group, context.coordinator)
        try:
            address = rendezvous.look_up(self._group, context.coordinator, 0.0)
            link = None if address is None else Link(Connection(connect(address)), address)
        except (*GONE, RuntimeError, ValueError):
            return False
        except OSError:  # its queue is full, or it cannot be reached just now
            return True
        if link is None:
            return False
        connection.close()
        self._say_hello(link)
        return True

    def _word_left(self) -> StepVerdict | None:
        """The verdict of a coordinator that left this operation before it let this rank in."""
        now, context = time.monotonic(), self.context
        if self._welcome or now - self._looked_s < WORD_S:
            return None
        self._looked_s = now
        try:
            word = rendezvous.read_verdict(self._group, context.coordinator, context.place)
            return None if word is None else StepVerdict.read(word)
        except (RuntimeError, ValueError):  # no store any more, or somebody else's word
            return None

    def _judge(self, head: Head, frame: Frame) -> Result | StepVerdict | None:
        context = self.context
        if frame.kind is FrameKind.WELCOME:
            self._welcome_in(frame)
        elif not self._welcome:
            text = "did not show that it is the coordinator"
            stranger = context.out_of_step(context.coordinator, text)
            self._require_connection().ended = f"it {text}"  # so that it is not used again
            return self._end(stranger, head)
        elif frame.kind is FrameKind.VERDICT:
            try:
                return self._obey(StepVerdict.read(frame))
            except ValueError as error:
                return self._end(
                    context.out_of_step(context.coordinator, f"sent garbage: {error}"), head
                )
        elif frame.kind is FrameKind.RESULT and frame.head == head:
            return Result(frame.segments)
        elif frame.kind is not FrameKind.ALERT:
            text = f"answered step {frame.head} with {frame.kind.name} where {head} was run"
            return self._end(context.out_of_step(context.coordinator, text), head)
        return None

    def _obey(self, verdict: StepVerdict) -> StepVerdict:
        if verdict.epoch:
            self._order.restart(verdict.epoch, verdict.causes)
        return verdict

    def _lost(self, head: Head, since_s: float) -> Cause | None:
        connection, context = self._require_connection(), self.context
        if connection.left:
            return context.left(context.coordinator, head.name)
        if connection.ended is not None:
            how = rendezvous.ended_process(self._group, context.coordinator) or connection.ended
            return context.ended(context.coordinator, head.name, how)
        quiet_s = time.monotonic() - max(since_s, connection.heard_s)
        if quiet_s > context.timeout_s + context.margin_s:
            return context.silent(context.coordinator, head.name)
        return None

    def trouble(self) -> str | None:
        """What the coordinator has told of, or that it is gone; says that this rank is alive."""
        if self._link is None or self._kept or (connection := self._link.connection).fileno() < 0:
            return None
        connection.receive()
        if not connection.pending and time.monotonic() - connection.said_s > self.context.ping_s:
            connection.queue(Frame(FrameKind.PING))
        connection.flush()
        for frame in connection.frames:
            if self._welcome_in(frame) and frame.kind is FrameKind.ALERT:
                return alert_text(frame)
            if self._welcome and frame.kind is FrameKind.VERDICT:
                with contextlib.suppress(ValueError):  # told by the next exchange
                    return "; ".join(cause.summary() for cause in StepVerdict.read(frame).causes)
        if (word := self._word_left()) is not None:
            return "; ".join(cause.summary() for cause in word.causes)
        if self._is_let_in_again(time.monotonic()):
            return None
        if connection.over:
            return f"{self.context.name_of(self.context.coordinator)} {connection.ended or 'left'}"
        return None

    def _welcome_in(self, frame: Frame) -> bool:
        if frame.kind is FrameKind.WELCOME:
            shown = bytes(frame.segments[0]) if frame.segments else b""
            self._welcome = hmac.compare_digest(shown, self._answer)
        return self._welcome

    def _end(self, cause: Cause, head: Head) -> StepVerdict:
        return StepVerdict(head.name, [cause], final=True)

    def leave(self, head: Head, cause: Cause) -> None:
        """Tell the coordinator why, and close."""
        until_s = time.monotonic() + PARTING_S
        if self._link is None:
            self._meet_to_leave(until_s)
        if self._link is None:
            with contextlib.suppress(RuntimeError, CoordinationError):
                word = LocalResult(cause=cause).frame(START)
                rendezvous.refuse(self._group, self.context.coordinator, self.context.place, word)
        elif not self._kept and (connection := self._link.connection).fileno() >= 0:
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
        if self._link is not None and not self._kept:
            self._link.connection.finish()
            self._keep()

    def _keep(self) -> None:
        if self._link is not None:
            self._kept = True
            keep(self._group, self.context.coordinator, self._link)

    def _require_connection(self) -> Connection:
        if self._link is None:
            raise ValueError(
                f"{self.context.name_of(self.context.rank)} has not joined the operation"
            )
        return self._link.connection


def _other_key(rank: int) -> CoordinationError:
    return CoordinationError(
        f"rank {rank} has another {SHARED_KEY} in its environment than the coordinator: set it to "
        "the same value on every rank, or on none"
    )


def _wait(connection: Connection, timeout_s: float) -> None:
    """Wait until something came, or queued bytes can go on; or until the time is over."""
    poll = select.poll()
    with contextlib.suppress(ValueError):  # closed: the caller sees it
        poll.register(
            connection.fileno(), select.POLLIN | (select.POLLOUT if connection.pending else 0)
        )
        poll.poll(max(1.0, timeout_s * 1000))
