"""The controller's ends of one rank: its report socket and the files that it writes to.

Enters: nothing. Leaves: descriptors for the rank to inherit, and what it wrote. The files are
memfds, so that what a killed rank wrote is still there.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket

from pytest_dcp.harness.events import Decoder
from pytest_dcp.harness.launch import RankFds

END_BYTES = 1 << 15
SEND_S = 5.0
"""A rank that takes no byte for so long is stopped or broken."""


class RankEnd:
    """One rank, as the controller holds it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(SEND_S)
        self.socket = ours
        self.decoder = Decoder()
        self.out, self.err, self.trace, self.draws = (
            os.memfd_create(name) for name in ("dcp-out", "dcp-err", "dcp-trace", "dcp-draws")
        )
        self.theirs = theirs
        self.pid = 0
        self.dead = ""

    def fds(self) -> RankFds:
        """What the rank inherits."""
        return RankFds(self.theirs.fileno(), self.out, self.err, self.trace, self.draws)

    def read(self, fd: int) -> str:
        """What is in one of the memfds; of much, the two ends."""
        size = os.fstat(fd).st_size
        if size <= 2 * END_BYTES:
            return os.pread(fd, size, 0).decode(errors="replace")
        head, tail = os.pread(fd, END_BYTES, 0), os.pread(fd, END_BYTES, size - END_BYTES)
        left_out = f"\n[... {size - 2 * END_BYTES} bytes left out ...]\n"
        return head.decode(errors="replace") + left_out + tail.decode(errors="replace")

    def empty_trace(self) -> None:
        """Have what the rank writes next stand at the begin: the offset is shared with it."""
        os.ftruncate(self.trace, 0)
        os.lseek(self.trace, 0, os.SEEK_SET)

    def unwatch(self, selector: selectors.BaseSelector) -> None:
        """Listen to the socket no more."""
        with contextlib.suppress(KeyError):
            selector.unregister(self.socket)

    def close(self) -> None:
        """Every descriptor."""
        self.socket.close()
        self.theirs.close()
        for fd in (self.out, self.err, self.trace, self.draws):
            os.close(fd)
