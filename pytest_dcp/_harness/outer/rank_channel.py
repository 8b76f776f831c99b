"""The controller's side of a rank that a seat runs: a socket pair and memory files, as for others.

Enters: messages about the rank. Leaves: bytes and contents where the supervisor's loop looks for
them. The hub's lock guards it.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from pytest_dcp._harness.outer.seat_link import SeatLink
from pytest_dcp._harness.outer.seat_messages import (
    RANK_FILES,
    FromRank,
    RankActivity,
    RankClosed,
    RankEnded,
    RankFile,
)
from pytest_dcp._harness.protocol.launcher import RankFds

RankKey = tuple[int, int]
"""World and rank."""


@dataclass(slots=True, eq=False)
class RankChannel:
    """One rank of one world, which a seat runs."""

    key: RankKey
    link: SeatLink
    files: dict[str, int]
    """Descriptors by name."""
    seat: int
    is_closing: bool = False
    """The rank has closed its end: close this one when all is delivered."""
    end_report: RankEnded | None = None
    ended_at: float = 0.0
    activity: tuple[bool, float] = (False, 0.0)
    is_open: bool = True
    is_forgotten: bool = False
    """The world is gone: no one reads its news."""

    def take(self, message: FromRank | RankClosed | RankFile | RankActivity | RankEnded) -> None:
        """A message of the rank's seat."""
        match message:
            case FromRank() if self.is_open:
                self.link.send(message.payload)
            case RankClosed():
                self.is_closing = True
            case RankFile() if message.name in self.files:
                _write_file(self.files[message.name], message)
            case RankActivity():
                self.activity = message.at_work, message.cpu_s
            case RankEnded():
                self.end_report, self.ended_at = message, time.monotonic()

    def close_link(self) -> None:
        """End the socket pair: the rank says no more."""
        if self.is_open:
            self.is_open = False
            self.link.close()

    def close(self) -> None:
        """Close everything."""
        self.close_link()
        for fd in self.files.values():
            os.close(fd)


def open_channel(key: RankKey, fds: RankFds, seat: int) -> RankChannel:
    """A rank's channel; the descriptors are duplicated."""
    link = SeatLink(socket.socket(fileno=os.dup(fds.socket)))
    files = {name: os.dup(getattr(fds, name)) for name in RANK_FILES}
    return RankChannel(key, link, files, seat)


def _write_file(fd: int, message: RankFile) -> None:
    """Make a memory file equal to the rank's own, but for the middle, which no one reads."""
    os.ftruncate(fd, message.size)
    head = message.payload[: len(message.payload) - message.tail]
    os.pwrite(fd, head, 0)
    if message.tail:
        os.pwrite(fd, message.payload[len(head) :], message.size - message.tail)
