"""A socket that never blocks: what is sent waits in memory until the other end takes it."""

from __future__ import annotations

import contextlib
import socket

from pytest_dcp._harness.outer.seat_messages import UNANSWERED_S

READ_BYTES = 1 << 18


class SeatLink:
    """One end of a stream."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)
        self._unsent = bytearray()

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait for the other end."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send now what the socket takes, and the rest by `flush`.

        An error of the connection is left to `receive`, which finds its end.
        """
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                try:
                    count = self.socket.send(self._unsent)
                except BlockingIOError:
                    raise
                except OSError:
                    self._unsent.clear()
                    return
                del self._unsent[:count]

    def receive(self) -> bytes | None:
        """Bytes that have come; empty at the end of the stream, None when there are none now."""
        try:
            return self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def watch_machine(sock: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other machine answers no more."""
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, UNANSWERED_S // 4),
        (socket.TCP_KEEPINTVL, UNANSWERED_S // 4),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, UNANSWERED_S * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
