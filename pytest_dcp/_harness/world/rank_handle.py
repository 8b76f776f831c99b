"""The controller's ends of one rank: its report socket and the files that it writes to.

Enters: nothing. Leaves: descriptors for the rank to inherit, and what it wrote. The files are
memfds, so that a killed rank's output survives.

Only the rank's own process speaks for it. The kernel reports which process sent any bytes on the
socket (SCM_CREDENTIALS, unix(7)); the first sender is the rank, which sends before any code of a
test runs. Other processes can get the socket: a child that the test forks, or a peer that takes a
copy of it (pidfd_getfd). A privileged process can forge the sender; but it could also write into
the controller's memory.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct

from pytest_dcp._harness.protocol.frames import WireError
from pytest_dcp._harness.protocol.launcher import RankFds
from pytest_dcp._harness.protocol.linux import command_of
from pytest_dcp._harness.protocol.messages import Decoder

END_BYTES = 1 << 15
DRAWS_BYTES = 1 << 24
"""Of what a rank draws for an example: Hypothesis stops at 8 KiB of choices."""
COMMAND_CHARS = 80
RECEIVE_BYTES = 1 << 16
CREDENTIALS = struct.Struct("iII")
"""struct ucred, unix(7): pid, uid, gid."""
CREDENTIALS_ROOM = socket.CMSG_SPACE(CREDENTIALS.size)
"""With no room beside them, the kernel drops descriptors that are sent along."""
SEND_S = 5.0
"""A rank that reads nothing for this long is stopped or broken."""


class RankEnd:
    """One rank, as the controller holds it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(SEND_S)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket = ours
        self.decoder = Decoder()
        self.out, self.err, self.trace, self.draws = (
            os.memfd_create(name) for name in ("dcp-out", "dcp-err", "dcp-trace", "dcp-draws")
        )
        self.theirs = theirs
        self.pid = 0
        """The rank's process, once it has said anything."""

    def fds(self) -> RankFds:
        """Descriptors that the rank inherits."""
        return RankFds(self.theirs.fileno(), self.out, self.err, self.trace, self.draws)

    def receive(self) -> bytes:
        """Bytes that the rank sent; empty at the end of file.

        Raises `WireError` when another process sent it.
        """
        data, ancillary, _, _ = self.socket.recvmsg(RECEIVE_BYTES, CREDENTIALS_ROOM)
        if data:
            (pid, _, _) = CREDENTIALS.unpack(ancillary[0][2])
            self.pid = self.pid or pid
            if pid != self.pid:
                raise WireError(
                    f"process {pid} ({command_of(pid)[:COMMAND_CHARS]}) wrote to the report "
                    f"socket of the rank, which is process {self.pid}"
                )
        return data

    def read(self, fd: int) -> str:
        """The contents of one of the memfds; if long, only its two ends."""
        size = os.fstat(fd).st_size
        if size <= 2 * END_BYTES:
            return os.pread(fd, size, 0).decode(errors="replace")
        head, tail = os.pread(fd, END_BYTES, 0), os.pread(fd, END_BYTES, size - END_BYTES)
        left_out = f"\n[... {size - 2 * END_BYTES} bytes left out ...]\n"
        return head.decode(errors="replace") + left_out + tail.decode(errors="replace")

    def empty_trace(self) -> None:
        """Make the rank's next output start at the beginning: the offset is shared with it."""
        os.ftruncate(self.trace, 0)
        os.lseek(self.trace, 0, os.SEEK_SET)

    def read_draws(self) -> bytes:
        """The record of what the rank drew for the last example."""
        return os.pread(self.draws, min(os.fstat(self.draws).st_size, DRAWS_BYTES), 0)

    def unwatch(self, selector: selectors.BaseSelector) -> None:
        """Stop listening to the socket."""
        with contextlib.suppress(KeyError):
            selector.unregister(self.socket)

    def close(self) -> None:
        """Every descriptor."""
        self.socket.close()
        self.theirs.close()
        for fd in (self.out, self.err, self.trace, self.draws):
            os.close(fd)
