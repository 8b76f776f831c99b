"""A connection between the coordinator and one peer: frames over a non-blocking socket.

`queue` takes frames and `flush` sends them; `receive` puts received frames into `frames`, in order.
No call blocks. The end of a link is recorded, never raised: `hung_up` (the other end closed it on
purpose) or `ended` (the connection broke, as it does when a process dies).

A link serves one operation after another. Each begins with the peer's HELLO and ends with one BYE
from either end, in any order: `finish` sends ours. After this end has left an operation, it drops
the operation's remaining frames up to the other's BYE; it reads nothing after a BYE until `finish`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import weakref
from collections import deque
from itertools import islice

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.authentication import Seal
from pytest_dcp._engine.coordinate.frame import Frame, FrameError, FrameKind, FrameReader, encode
from pytest_dcp._engine.coordinate.payload import Segment

READS_AT_ONCE = 4096
"""System calls in one `receive`: two for each frame, and more for long ones."""
MOST_WAITING = 64
"""Received frames that may wait: a busy rank gets a few in each step."""
PINGED_S, MOST_PINGS = 1.0, 1000
"""A rank pings four times in a group's timeout."""
MAX_PIECES = 512
"""Pieces per sendmsg; Linux takes at most 1,024."""

_open: weakref.WeakSet[Connection] = weakref.WeakSet()


class Connection:
    """One end of a link."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.reader = FrameReader()
        self.frames: deque[Frame] = deque()
        """Received frames that are not yet handled."""
        self.has_left = False
        """Whether the other end has left the operation."""
        self.hung_up = False
        """Whether the other end has closed the connection on purpose."""
        self.end_reason: str | None = None
        """How the connection broke."""
        self.is_garbled = False
        """Whether it ended because the other end is not a rank of the group, or misbehaves."""
        self.heard_s = time.monotonic()
        """When bytes last came."""
        self.said_s = self.heard_s
        """When a frame was last queued."""
        self._out: deque[memoryview] = deque()
        self._unfinished = 0
        """Number of operations that this end has left and the other has not."""
        self._seal: Seal | None = None
        self._pings, self._pinged_s = 0, self.heard_s
        """Pings since then."""
        _open.add(self)

    def fileno(self) -> int:
        """The socket's, for a selector; -1 when closed."""
        return self.sock.fileno()

    @property
    def over(self) -> bool:
        """Whether no more frames of this operation can arrive."""
        return self.has_left or self.closed

    @property
    def closed(self) -> bool:
        """Whether no more frames can arrive at all."""
        return self.hung_up or self.end_reason is not None

    @property
    def pending(self) -> bool:
        """Whether queued bytes wait to be sent."""
        return bool(self._out)

    @property
    def is_sealed(self) -> bool:
        """Whether frames carry seals."""
        return self._seal is not None

    def seal(self, *, outgoing: Seal, incoming: Seal) -> None:
        """Seal frames queued from now on, and accept only frames with the other end's seals."""
        self._seal, self.reader.seal = outgoing, incoming

    def queue(self, frame: Frame) -> None:
        """Send a frame as soon as the socket takes it; its segments must not change until then."""
        self.queue_encoded(encode(frame))

    def queue_encoded(self, pieces: list[Segment]) -> None:
        """Send the pieces of an encoded frame."""
        self.said_s = time.monotonic()
        if self.end_reason is None:
            if self._seal is not None:
                pieces = [*pieces, self._seal.next(pieces)]
            views = (memoryview(piece) for piece in pieces)
            self._out.extend(view.cast("B") for view in views if view.nbytes)

    def flush(self) -> bool:
        """Send as much as the socket takes. Returns whether all is sent."""
        while self._out and self.end_reason is None:
            pieces = islice(self._out, MAX_PIECES)
            try:
                sent_bytes = operating_system.send_pieces(self.sock, list(pieces))
            except BlockingIOError:
                return False
            except OSError as error:
                # Still read the bytes from before the break: they may give the reason.
                self.receive()
                self.end_reason = self.end_reason or _how(error)
                break
            self._drop(sent_bytes)
        if self.end_reason is not None:
            self._out.clear()
        return not self._out

    def _drop(self, sent_bytes: int) -> None:
        while sent_bytes and self._out:
            first = self._out[0]
            if sent_bytes < len(first):
                self._out[0] = first[sent_bytes:]
                return
            sent_bytes -= len(first)
            self._out.popleft()

    def receive(self, *, one: bool = False) -> None:
        """Move received frames, or only the first, into `frames`; pings only count as signs of
        life.

        Takes only a part from a peer that never stops sending; the next call takes more.
        """
        for _ in range(READS_AT_ONCE):
            if self.over:
                return
            try:
                count = self.sock.recv_into(self.reader.space())
            except BlockingIOError:
                return
            except OSError as error:
                self.end_reason = _how(error)
                return
            if count == 0:
                self.end_reason = "connection closed"
                return
            self.heard_s = time.monotonic()
            self._take_bytes(count)
            if one and self.frames:
                return

    def _take_bytes(self, count: int) -> None:
        try:
            frame = self.reader.take_bytes(count)
        except FrameError as error:
            self.end_reason, self.is_garbled = f"it sent garbage: {error}", True
            return
        if frame is None or self._is_too_much(frame):
            return
        if frame.kind is FrameKind.PING:
            return
        if frame.kind is FrameKind.HANG_UP:
            self.hung_up = True
        # The first goodbyes of the other end are for operations that this end left before.
        elif frame.kind is FrameKind.BYE and self._unfinished:
            self._unfinished -= 1
        elif frame.kind is FrameKind.BYE:
            self.has_left = True
        elif not self._unfinished:
            self.frames.append(frame)

    def _is_too_much(self, frame: Frame) -> bool:
        """Whether the other end sends more than any rank would; that ends the connection."""
        if frame.kind is not FrameKind.PING:
            full = len(self.frames) >= MOST_WAITING
        elif self.heard_s - self._pinged_s > PINGED_S:
            self._pinged_s, self._pings, full = self.heard_s, 1, False
        else:
            self._pings += 1
            full = self._pings > MOST_PINGS
        if full:
            what = "pings without end" if frame.kind is FrameKind.PING else "more than a step has"
            self.end_reason, self.is_garbled = f"it sent garbage: {what}", True
        return full

    def finish(self) -> None:
        """Leave the operation, so that the connection can serve the next one."""
        self.queue(Frame(FrameKind.BYE))
        # Messages of an operation that this end leaves concern nothing any more.
        self.frames.clear()
        if self.has_left:
            self.has_left = False
        else:
            self._unfinished += 1
        self.flush()

    def hang_up(self) -> None:
        """Close the connection, and send that this process lives."""
        self.queue(Frame(FrameKind.HANG_UP))
        if self.sock.fileno() >= 0:
            self.flush()
            self.receive()  # unread bytes would make the kernel reset the connection
        self.close()

    def close(self) -> None:
        """Send as much as possible without waiting, and close. A second call does nothing."""
        if self.sock.fileno() >= 0:
            self.flush()
            self.sock.close()
        self._out.clear()

    def __del__(self) -> None:
        """Close without a message if the owner ended first: a group that is collected at exit."""
        if (sock := getattr(self, "sock", None)) is not None:
            sock.close()


def _how(error: OSError) -> str:
    name = os.strerror(error.errno) if error.errno else str(error)
    return f"connection lost: {name}"


def _forget_in_child() -> None:
    """Close a forked child's copies: they would hide the parent's end from its peers."""
    for line in list(_open):
        with contextlib.suppress(OSError):
            line.sock.close()


operating_system.call_in_forked_children(_forget_in_child)
