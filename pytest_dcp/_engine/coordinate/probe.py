"""Whether a process still listens at its address.

The kernel accepts connections for a process as long as it lives, however busy, stopped or stuck it
is, and refuses them when it has ended. So a refusal proves more than a missed heartbeat. It counts
when it lasts: for `CONFIRM_S` if the address is known to lead to the process, since it accepted a
connection before; else for `REFUSED_S`, since a firewall between may refuse, too, and a living rank
will join by itself. An address that does not answer (a full queue, a network that is down) proves
nothing.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
import struct
import time

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.gloo_listener import GlooListener

REFUSED_S = 20.0
CONFIRM_S = 2.0
AGAIN_S = 1.0
"""Pause between two attempts while the address refuses."""
LATER_S = 10.0
"""Pause between two attempts otherwise: each takes a place in the process's queue."""
CONNECT_S = 5.0
"""Limit of one attempt at an address that does not answer."""
QUIET_S = 0.03
"""Limit of one quiet attempt: long for a network, and far below the 0.2 s for which the kernel
delays an acknowledgement (TCP_DELACK_MAX)."""
QUIET_LATER_S = 2.0
"""Pause between two quiet attempts unless the address refuses: they cost the process nothing."""
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Probe:
    """One address, tried again and again. No call waits."""

    def __init__(self, host: str, port: int) -> None:
        """host: numeric, so that no resolver is asked."""
        self._where = (host, port)
        self._sock: socket.socket | None = None
        self._next_s = 0.0
        """When the next attempt begins, or the current one ends."""
        self._was_there = False
        self._refused_s: float | None = None
        """Since when every attempt was refused."""

    @property
    def is_under_way(self) -> bool:
        """Whether an attempt holds a descriptor."""
        return self._sock is not None

    @property
    def was_answered(self) -> bool:
        """Whether the address is known to lead to a process that listens, or did."""
        return self._was_there

    def look(self) -> str | None:
        """Begin or continue an attempt; the sign that the process has ended, or None."""
        now = time.monotonic()
        if self._sock is not None:
            if (outcome := self._outcome(self._sock, now)) is not None:
                self.close()
                self._conclude(outcome, now)
        elif now >= self._next_s:
            self._begin(now)
        if self._refused_s is None or self.is_under_way:
            return None
        refused_s = now - self._refused_s
        if refused_s < (CONFIRM_S if self._was_there else self._patience_s()):
            return None
        return self._describe_end(*self._where)

    def _patience_s(self) -> float:
        """How long the address must refuse before the process counts as ended."""
        return REFUSED_S

    def _later_s(self) -> float:
        return LATER_S

    def _describe_end(self, host: str, port: int) -> str:
        return f"nothing listens at its address {host}:{port} any more"

    def _begin(self, now: float) -> None:
        family = socket.AF_INET6 if ":" in self._where[0] else socket.AF_INET
        self._next_s = now + CONNECT_S
        try:
            self._sock = self._open(family)
        except OSError:  # no descriptors left
            self._next_s = now + LATER_S
            return
        self._sock.setblocking(False)
        error = self._sock.connect_ex(self._where)
        if error not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            self.close()
            self._conclude(error, now)

    def _open(self, family: socket.AddressFamily) -> socket.socket:
        return socket.socket(family)

    def _outcome(self, sock: socket.socket, now: float) -> int | None:
        """The error number of the attempt, 0 for a connection, None while it goes on."""
        if not operating_system.wait_for_socket(sock, 0.0, to_read=False, to_write=True):
            return errno.ETIMEDOUT if now > self._next_s else None
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return error
        with contextlib.suppress(OSError):  # reset already: it was accepted before
            if sock.getsockname() == sock.getpeername():
                return errno.ECONNREFUSED  # the kernel connected the socket to itself
        return 0

    def _conclude(self, error: int, now: float) -> None:
        if error == errno.ECONNREFUSED:
            self._refused_s = now if self._refused_s is None else self._refused_s
            self._next_s = now + AGAIN_S
            return
        # A reset after the connection was accepted: the queue is full (tcp_abort_on_overflow).
        self._was_there = self._was_there or error in (0, errno.ECONNRESET)
        self._refused_s = None
        self._next_s = now + self._later_s()

    def close(self) -> None:
        """End the attempt under way."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class QuietProbe(Probe):
    """Tries the address where gloo listens for a rank, without gloo's notice.

    gloo must not see the attempt: if its process has no descriptor left, accept() fails, and gloo
    ends the process. So the attempt is reset before it becomes a connection: the other kernel
    answers our SYN, ours delays the acknowledgement (TCP_QUICKACK off), and close() sends a reset.
    Nothing enters the queue from which gloo accepts. Health checks of load balancers do the same.

    An attempt waits `QUIET_S` for its answer. A refusal never counts unless the address is known to
    lead to the rank: unlike a rank that listens for us, this one may take long to join.
    """

    def __init__(self, listener: GlooListener, *, leads_there: bool) -> None:
        """leads_there: the address is known to lead to the rank."""
        super().__init__(listener.host, listener.port)
        self._was_there = leads_there

    @staticmethod
    def is_possible() -> bool:
        """Whether this system can delay an acknowledgement: only Linux can."""
        return hasattr(socket, "TCP_QUICKACK")

    def _begin(self, now: float) -> None:
        super()._begin(now)
        if self._sock is None:
            return
        operating_system.wait_for_socket(self._sock, QUIET_S, to_read=False, to_write=True)
        outcome = self._outcome(self._sock, now)
        self.close()
        self._conclude(errno.ETIMEDOUT if outcome is None else outcome, now)

    def _open(self, family: socket.AddressFamily) -> socket.socket:
        sock = super()._open(family)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        return sock

    def _patience_s(self) -> float:
        return math.inf

    def _later_s(self) -> float:
        return QUIET_LATER_S

    def _describe_end(self, host: str, port: int) -> str:
        return (
            f"nothing listens at {host}:{port} any more, where gloo did: its process has ended, or "
            "it has destroyed the process group"
        )
