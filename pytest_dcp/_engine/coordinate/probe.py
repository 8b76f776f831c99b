"""Whether a process of another machine still listens at its address.

The kernel takes connections for a process as long as it lives, however busy, stopped or stuck it
is, and refuses them when it has ended. So a refusal says what a missed heartbeat cannot. It is
believed when it stays: for `CONFIRM_S` where the address took a connection before, else for
`REFUSED_S`, since a firewall between may refuse, too, and a rank that lives comes by itself. An
address that does not answer (a full queue, a network that is down) says nothing.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time

REFUSED_S = 20.0
CONFIRM_S = 2.0
AGAIN_S = 1.0
"""Between two tries while the address refuses."""
LATER_S = 10.0
"""Between two tries else: each one takes a place in the queue of the process."""
CONNECT_S = 5.0
"""One try of an address that does not answer."""


class Probe:
    """One address, tried again and again. No call waits."""

    def __init__(self, host: str, port: int) -> None:
        """host: numeric, so that no resolver is asked."""
        self._where = (host, port)
        self._sock: socket.socket | None = None
        self._next_s = 0.0
        """When the next try begins, or the one under way ends."""
        self._was_there = False
        self._refused_s: float | None = None
        """Since when every try was refused."""

    @property
    def is_under_way(self) -> bool:
        """Whether a try holds a descriptor."""
        return self._sock is not None

    def look(self) -> str | None:
        """Go on; how it is known that the process has ended, or None."""
        now = time.monotonic()
        if self._sock is not None:
            if (outcome := self._outcome(self._sock, now)) is not None:
                self.close()
                self._conclude(outcome, now)
        elif now >= self._next_s:
            self._begin(now)
        if self._refused_s is None:
            return None
        refused_s = now - self._refused_s
        if refused_s < (CONFIRM_S if self._was_there else REFUSED_S):
            return None
        host, port = self._where
        return f"nothing listens at its address {host}:{port} any more"

    def _begin(self, now: float) -> None:
        family = socket.AF_INET6 if ":" in self._where[0] else socket.AF_INET
        self._next_s = now + CONNECT_S
        try:
            self._sock = socket.socket(family)
        except OSError:  # no descriptors left
            self._next_s = now + LATER_S
            return
        self._sock.setblocking(False)
        error = self._sock.connect_ex(self._where)
        if error not in (0, errno.EINPROGRESS):
            self.close()
            self._conclude(error, now)

    def _outcome(self, sock: socket.socket, now: float) -> int | None:
        """The error number of the try, 0 for a connection, None while it goes on."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        if not poll.poll(0):
            return errno.ETIMEDOUT if now > self._next_s else None
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return error
        with contextlib.suppress(OSError):  # reset already: it was taken all the same
            if sock.getsockname() == sock.getpeername():
                return errno.ECONNREFUSED  # the kernel lent it the very port
        return 0

    def _conclude(self, error: int, now: float) -> None:
        if error in (errno.ECONNREFUSED, errno.ECONNRESET):
            self._refused_s = now if self._refused_s is None else self._refused_s
            self._next_s = now + AGAIN_S
            return
        self._was_there = self._was_there or error == 0
        self._refused_s = None
        self._next_s = now + LATER_S

    def close(self) -> None:
        """End the try under way."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
