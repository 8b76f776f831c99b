"""A peer's connections to its coordinators: one for each group, kept between operations.

An operation takes the idle connection with `take_idle`, or makes one with `connect`, and gives it
back with `keep_connection`. If two operations run at once, the second makes its own connection, and
the first one given back is kept. An idle connection only shows that this process lives: it breaks
when the process ends, so the coordinator knows at once that this rank will not join.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.descriptors import EXHAUSTED, exhaustion_error
from pytest_dcp._engine.coordinate.hello import IDLE, Address, Hello, greet
from pytest_dcp._engine.coordinate.machines import machine

LOOPBACK_ADDRESS = "127.0.0.1"
CONNECT_S = 5.0
"""Limit of one attempt to connect. A full accept queue does not answer at all."""
GONE = (ConnectionRefusedError, ConnectionResetError)
"""Errors that occur only at an address without a listener."""


@dataclass(frozen=True, slots=True)
class Link:
    """One connection to a coordinator."""

    connection: Connection
    address: Address
    """The coordinator's address, and the secret that both ends prove to know."""

    @property
    def lasts(self) -> bool:
        """Whether it can serve an operation."""
        return self.connection.fileno() >= 0 and not self.connection.closed


def take_idle(group: dist.ProcessGroup, coordinator: int) -> Link | None:
    """The idle connection to a coordinator, for one operation; None without one."""
    meeting = rendezvous.meeting_of(group)
    with meeting.tying:
        link = meeting.idle.pop(coordinator, None)
    if link is None:
        return None
    link.connection.receive()
    if not link.lasts:
        link.connection.close()
        return None
    return link


def keep_connection(group: dist.ProcessGroup, coordinator: int, link: Link) -> None:
    """Keep a connection for the next operation when this one is over."""
    meeting = rendezvous.meeting_of(group)
    with meeting.tying:
        current_link = meeting.idle.get(coordinator)
        if link.lasts and (current_link is None or not current_link.lasts):
            meeting.idle[coordinator] = link
            return
    link.connection.hang_up()


def open_liveness_connection(
    group: dist.ProcessGroup, coordinator: int, rank: int, address: Address
) -> None:
    """Make sure that the coordinator sees this process end, even before its first operation.

    Raises OSError if nothing answers there.
    """
    meeting = rendezvous.meeting_of(group)
    with meeting.tying:
        current_link = meeting.idle.get(coordinator)
        if current_link is not None:
            current_link.connection.receive()
            if current_link.lasts:
                return
            current_link.connection.close()
        link = meeting.idle[coordinator] = Link(Connection(connect(address)), address)
        hello = Hello(rendezvous.group_key(group, coordinator), IDLE, 0, rank)
        greet(link.connection, hello, address.key())


def connect(address: Address) -> socket.socket:
    """A connection to the listener at an address.

    If none of its hosts takes a connection, raises the error that says most about the process:

    - TimeoutError: a host may be there and did not answer in time; it is busy.
    - ConnectionRefusedError or ConnectionResetError: nothing listens there.
    - another OSError: no host can be reached from here, which says nothing about the process.

    Raises CoordinationError if this process cannot open a socket.
    """
    errors: list[OSError] = []
    for attempt in _attempts(address, errors):
        try:
            return _refuse_self_connection(attempt())
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise exhaustion_error(error, 1) from error
            errors.append(error)
    telling: list[OSError] = [error for error in errors if isinstance(error, TimeoutError)]
    telling += [error for error in errors if isinstance(error, GONE)]
    raise (telling or errors or [ConnectionRefusedError(f"no host in {address}")])[0]


def _attempts(address: Address, errors: Sequence[OSError]) -> Iterator[Callable[[], socket.socket]]:
    """Ways to connect, best first; `errors` holds the errors of the earlier ones.

    If the machine is this one and its loopback refuses, its name is not resolved: a resolver could
    take any time.
    """
    own = ""
    if address.machine == machine():
        yield lambda: _on_this_machine(address.port)
        own = socket.gethostname() if isinstance(errors[0], ConnectionRefusedError) else ""
    for host in address.hosts:
        if host != own:
            yield partial(socket.create_connection, (host, address.port), CONNECT_S)


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


def _refuse_self_connection(sock: socket.socket) -> socket.socket:
    """The socket, unless nothing listens there and the kernel connected the socket to itself."""
    try:
        itself = sock.getsockname() == sock.getpeername()
    except OSError:  # it ended already: the reader will see it
        itself = False
    if itself:
        sock.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock
