"""The end of a controller that had not read everything is its end, and no traceback."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest

from pytest_dcp._harness.launchers.zygote import Zygote
from pytest_dcp._harness.rank.channel import Channel, ControllerGoneError
from pytest_dcp._harness.rank.rank_interrupts import RankInterrupts


def reset(kind: int) -> socket.socket:
    """A socket whose other end was closed while it had something to read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.send(b"unread")
    theirs.close()
    return ours


def test_a_rank_takes_a_reset_for_the_end_of_its_controller() -> None:
    with contextlib.closing(reset(socket.SOCK_STREAM)) as sock:
        channel = Channel(sock.detach(), RankInterrupts())
        with pytest.raises(ControllerGoneError):
            channel.receive()
        channel._socket.close()


def test_a_zygote_takes_a_reset_for_the_end_of_its_controller() -> None:
    zygote: Any = Zygote.__new__(Zygote)
    with reset(socket.SOCK_SEQPACKET) as zygote.control:
        assert zygote.handle_request() is False
