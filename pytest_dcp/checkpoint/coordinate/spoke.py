"""A peer's side of the star: one line to the coordinator.

The peer connects before its first step's work, so that the coordinator notices its end from then
on. It waits as long as the coordinator is heard of; a coordinator in long work of its own may be
silent for the timeout and a margin.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import select
import socket
import time
from collections.abc import Sequence

import torch.distributed as dist

from pytest_dcp.checkpoint.coordinate import rendezvous
from pytest_dcp.checkpoint.coordinate.failure import Cause, CoordinationError
from pytest_dcp.checkpoint.coordinate.frame import START, Frame, Head, Kind, alert_text
from pytest_dcp.checkpoint.coordinate.line import Line
from pytest_dcp.checkpoint.coordinate.reception import TETHER, Address, Hello, machine
from pytest_dcp.checkpoint.coordinate.sequence import CallOrder
from pytest_dcp.checkpoint.coordinate.star import (
    PARTING_S,
    Combine,
    Result,
    Site,
    Statement,
    Verdict,
)

LOOPBACK_ADDRESS = "127.0.0.1"
CONNECT_S = 5.0
"""One try of an address that does not answer. A full accept queue answers to none of them."""
REFUSED_S = 0.5
"""How long a refused address may be replaced by the address of a coordinator that came anew."""
AGAIN_S = 0.2
"""Between two tries to be let in, where strangers crowd the coordinator."""
WORD_S = 0.5
"""How often a peer that is not let in looks whether the coordinator left word for it."""
TICK_S = 0.5
"""Longest single wait, so that signals are handled soon on every Python."""


class Spoke:
    """A peer's line to the coordinator, for one operation."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._line: Line | None = None
        self._answer = ""
        self._welcome = False
        self._met_s = 0.0
        """When this rank last said hello."""
        self._looked_s = time.monotonic()

    @property
    def _group(self) -> dist.ProcessGroup:
        if self.site.group is None:
            raise ValueError(f"rank {self.site.rank} has no group to meet its coordinator in")
        return self.site.group

    @property
    def _order(self) -> CallOrder:
        return rendezvous.meeting_of(self._group).order

    def join(self, head: Head) -> Verdict | None:
        """Connect, at the first step; a verdict when no coordinator is there."""
        if self._line is not None:
            return None
        site, group = self.site, self._group
        try:
            address, sock, how = self._find(time.monotonic() + site.timeout_s + site.margin_s)
        except RuntimeError as error:  # of the store
            return self._end(site.ended(site.coordinator, head.name, f"its store: {error}"), head)
        if address is None and not how:
            return self._end(site.silent(site.coordinator, head.name), head)
        if address is None or sock is None:
            return self._end(site.ended(site.coordinator, head.name, how), head)
        self._say_hello(address, sock)
        try:
            tie(group, site.coordinator, site.rank, address)
        except TimeoutError:
            pass  # busy: tied in the next operation, and until the end of this one by its line
        except OSError as error:
            return self._end(site.ended(site.coordinator, head.name, str(error)), head)
        return None

    def _say_hello(self, address: Address, sock: socket.socket) -> None:
        site, place = self.site, self.site.place
        self._met_s = time.monotonic()
        self._line, self._answer = Line(sock), address.answer
        hello = Hello(
            rendezvous.group_key(self._group, site.coordinator),
            site.operation,
            place.number,
            site.rank,
            place.epoch,
            self._order.finished_up_to(),
            place.unordered,
            None if place.subject is None else (place.subject.name, place.subject.real),
        )
        self._line.queue(hello.frame(address.secret))
        self._line.flush()

    def _find(self, until_s: float) -> tuple[Address | None, socket.socket | None, str]:
        group, coordinator = self._group, self.site.coordinator
        how, last_s = "", None
        while True:
            address = rendezvous.look_up(
                group, coordinator, min(until_s, time.monotonic() + TICK_S)
            )
            if address is None:
                how = rendezvous.ended_process(group, coordinator) or ""
                if how or time.monotonic() > until_s:
                    return None, None, how
                continue
            try:
                return address, connect(address), how
            except TimeoutError:
                # Its queue is full, or its machine is busy: it is waited for like any late rank.
                if time.monotonic() > until_s:
                    return None, None, how
                continue
            except OSError as error:
                how, now = f"nobody answers at its address: {error}", time.monotonic()
            rendezvous.forget(group, coordinator)
            last_s = last_s or now + REFUSED_S
            if now > min(last_s, until_s):
                return address, None, how
            time.sleep(REFUSED_S / 10)

    def exchange(self, head: Head, own: Statement, combine: Combine) -> Result | Verdict:
        """Send the statement and wait for the result; `combine` is the coordinator's."""
        line = self._require_line()
        line.queue(own.frame(head))
        since_s = time.monotonic()
        while True:
            line.flush()
            line.receive()
            while line.frames:
                outcome = self._judge(head, line.frames.popleft())
                if outcome is not None:
                    return outcome
            if self._is_let_in_again(since_s):
                if line is not self._require_line():
                    line = self._require_line()
                    line.queue(own.frame(head))
                continue
            lost = self._lost(head, since_s)
            if lost is not None:
                # All peers say the same of the coordinator, and tell it, should it come back.
                line.queue(Statement(cause=lost).frame(head))
                return Verdict(head.name, [lost], final=True)
            if (word := self._word_left()) is not None:
                return self._obey(word)
            if not self._welcome and self._order.is_dropped(self.site.place):
                return Verdict(head.name, self._order.causes, final=True)
            _wait(line, min(TICK_S, self.site.ping_s))

    def _is_let_in_again(self, since_s: float) -> bool:
        """Say hello anew where the coordinator closed the line before it let this rank in.

        It does so when strangers crowd it. Whether to go on; False: the line is as it was.
        """
        site = self.site
        if self._welcome or self._require_line().ended is None:
            return False
        if time.monotonic() - since_s > site.timeout_s + site.margin_s:
            return False
        time.sleep(max(0.0, self._met_s + AGAIN_S - time.monotonic()))
        self._met_s = time.monotonic()
        rendezvous.forget(self._group, site.coordinator)
        try:
            address = rendezvous.look_up(self._group, site.coordinator, 0.0)
            sock = None if address is None else connect(address)
        except TimeoutError:
            return True
        except (OSError, RuntimeError):
            return False
        if address is None or sock is None:
            return False
        self._require_line().close()
        self._say_hello(address, sock)
        return True

    def _word_left(self) -> Verdict | None:
        """The verdict of a coordinator that left this operation before it let this rank in."""
        now, site = time.monotonic(), self.site
        if self._welcome or now - self._looked_s < WORD_S:
            return None
        self._looked_s = now
        try:
            word = rendezvous.posted(self._group, site.coordinator, site.place)
            return None if word is None else Verdict.read(word)
        except (RuntimeError, ValueError):  # no store any more, or somebody else's word
            return None

    def _judge(self, head: Head, frame: Frame) -> Result | Verdict | None:
        site = self.site
        if frame.kind is Kind.WELCOME:
            shown = bytes(frame.segments[0]) if frame.segments else b""
            self._welcome = hmac.compare_digest(shown, self._answer.encode())
        elif not self._welcome:
            stranger = site.out_of_step(site.coordinator, "did not show that it is the coordinator")
            return self._end(stranger, head)
        elif frame.kind is Kind.VERDICT:
            try:
                return self._obey(Verdict.read(frame))
            except ValueError as error:
                return self._end(site.out_of_step(site.coordinator, f"sent garbage: {error}"), head)
        elif frame.kind is Kind.RESULT and frame.head == head:
            return Result(frame.segments)
        elif frame.kind is not Kind.ALERT:
            text = f"answered step {frame.head} with {frame.kind.name} where {head} was run"
            return self._end(site.out_of_step(site.coordinator, text), head)
        return None

    def _obey(self, verdict: Verdict) -> Verdict:
        if verdict.epoch:
            self._order.restart(verdict.epoch, verdict.causes)
        return verdict

    def _lost(self, head: Head, since_s: float) -> Cause | None:
        line, site = self._require_line(), self.site
        if line.left:
            return site.left(site.coordinator, head.name)
        if line.ended is not None:
            return site.ended(site.coordinator, head.name, line.ended)
        quiet_s = time.monotonic() - max(since_s, line.heard_s)
        if quiet_s > site.timeout_s + site.margin_s:
            return site.silent(site.coordinator, head.name)
        return None

    def trouble(self) -> str | None:
        """What the coordinator has told of, or that it is gone; says that this rank is alive."""
        line = self._line
        if line is None or line.fileno() < 0:
            return None
        line.receive()
        if not line.pending and time.monotonic() - line.said_s > self.site.ping_s:
            line.queue(Frame(Kind.PING))
        line.flush()
        for frame in line.frames:
            if self._welcome_in(frame) and frame.kind is Kind.ALERT:
                return alert_text(frame)
            if self._welcome and frame.kind is Kind.VERDICT:
                with contextlib.suppress(ValueError):  # told by the next exchange
                    return "; ".join(cause.summary() for cause in Verdict.read(frame).causes)
        if (word := self._word_left()) is not None:
            return "; ".join(cause.summary() for cause in word.causes)
        if self._is_let_in_again(time.monotonic()):
            return None
        if line.over:
            return f"{self.site.name_of(self.site.coordinator)} {line.ended or 'left'}"
        return None

    def _welcome_in(self, frame: Frame) -> bool:
        if frame.kind is Kind.WELCOME and frame.segments:
            shown = bytes(frame.segments[0])
            self._welcome = hmac.compare_digest(shown, self._answer.encode())
        return self._welcome

    def _end(self, cause: Cause, head: Head) -> Verdict:
        return Verdict(head.name, [cause], final=True)

    def leave(self, head: Head, cause: Cause) -> None:
        """Tell the coordinator why, and close."""
        until_s = time.monotonic() + PARTING_S
        if self._line is None:
            self._meet_to_leave(until_s)
        if self._line is None:
            with contextlib.suppress(RuntimeError, CoordinationError):
                word = Statement(cause=cause).frame(START)
                rendezvous.refuse(self._group, self.site.coordinator, self.site.place, word)
        line = self._line
        if line is not None and line.fileno() >= 0:
            line.queue(Frame(Kind.FAILED, head, Statement(cause=cause).frame(head).segments))
            line.queue(Frame(Kind.BYE))
            while not line.flush() and time.monotonic() < until_s:
                _wait(line, PARTING_S / 10)
            line.receive()
            line.close()

    def _meet_to_leave(self, until_s: float) -> None:
        """Connect before the first step, if the coordinator has an address by now."""
        with contextlib.suppress(RuntimeError, OSError, CoordinationError):
            address, sock, _ = self._find(until_s)
            if address is not None and sock is not None:
                self._say_hello(address, sock)

    def close(self) -> None:
        """Say goodbye, and close."""
        if self._line is not None and self._line.fileno() >= 0:
            self._line.queue(Frame(Kind.BYE))
            self._line.close()

    def _require_line(self) -> Line:
        if self._line is None:
            raise ValueError(f"{self.site.name_of(self.site.rank)} has not joined the operation")
        return self._line


def tie(group: dist.ProcessGroup, coordinator: int, rank: int, address: Address) -> None:
    """Make sure that the coordinator sees this process end, in later operations too.

    Raises OSError when nobody answers there.
    """
    meeting = rendezvous.meeting_of(group)
    with meeting.tying:
        old = meeting.tethers.get(coordinator)
        if old is not None and old.fileno() >= 0:
            old.receive()
            if not old.over:
                return
            old.close()
        tether = meeting.tethers[coordinator] = Line(connect(address))
        hello = Hello(rendezvous.group_key(group, coordinator), TETHER, 0, rank)
        tether.queue(hello.frame(address.secret))
        tether.flush()


def connect(address: Address) -> socket.socket:
    """A connection to the reception at an address.

    Raises TimeoutError when one of its hosts may be there and did not answer in time, else the last
    OSError, when none of them takes a connection. Where the loopback of its machine refuses, its
    name is not asked for if it is ours: a resolver could take any time.
    """
    failed: OSError = ConnectionRefusedError(f"no host in {address}")
    hosts: Sequence[str] = address.hosts
    busy: OSError | None = None
    if address.machine == machine():
        try:
            return _not_itself(_on_this_machine(address.port))
        except ConnectionRefusedError as error:
            own = socket.gethostname()
            failed, hosts = error, [host for host in hosts if host != own]
        except TimeoutError as error:
            failed = busy = error
        except OSError as error:
            failed = error
    for host in hosts:
        try:
            sock = socket.create_connection((host, address.port), timeout=CONNECT_S)
            return _not_itself(sock)
        except TimeoutError as error:
            busy = error
        except OSError as error:
            failed = error
    raise busy or failed


def _on_this_machine(port: int) -> socket.socket:
    """A connection through the loopback, which needs no resolver."""
    sock = socket.socket()
    try:
        sock.settimeout(CONNECT_S)
        sock.connect((LOOPBACK_ADDRESS, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _not_itself(sock: socket.socket) -> socket.socket:
    """The socket, unless nobody listens there and the kernel lent it the very port."""
    try:
        itself = sock.getsockname() == sock.getpeername()
    except OSError:  # it ended already: whoever reads sees it
        itself = False
    if itself:
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


def _wait(line: Line, timeout_s: float) -> None:
    """Wait until something came, or queued bytes can go on; or until the time is over."""
    poll = select.poll()
    with contextlib.suppress(ValueError):  # closed: the caller sees it
        poll.register(line.fileno(), select.POLLIN | (select.POLLOUT if line.pending else 0))
        poll.poll(max(1.0, timeout_s * 1000))
