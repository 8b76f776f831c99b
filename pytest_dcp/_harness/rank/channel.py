"""A rank's end of the report socket."""

from __future__ import annotations

import os
import select
import socket
import threading
from dataclasses import replace
from typing import TypeVar

from pytest_dcp._harness.protocol.messages import (
    At,
    DebugAnswer,
    Decoder,
    Done,
    FaultAnswer,
    Message,
    Met,
    encode,
)
from pytest_dcp._harness.rank.rank_interrupts import RankInterrupts
from pytest_dcp.errors import DcpError

RECEIVE_BYTES = 1 << 16
M = TypeVar("M", bound=Message)


class ControllerGoneError(DcpError):
    """The report socket reached its end: the controller no longer waits for this rank."""


class Channel:
    """A rank's end of the report socket: send, and wait for the reply."""

    def __init__(self, fd: int, interrupts: RankInterrupts, clock_ahead_s: float = 0.0) -> None:
        self._interrupts = interrupts
        self._clock_ahead_s = clock_ahead_s
        """By how much this machine's clock is ahead of the controller's."""
        self._socket = socket.socket(fileno=fd)
        self._decoder = Decoder()
        self._pending: list[Message] = []
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._sending = threading.Lock()
        """One thread may send a message while another waits for a reply."""

    @property
    def is_ours(self) -> bool:
        """Whether this is the rank's own process, not one that was forked from it."""
        return os.getpid() == self._pid

    def send(self, message: Message) -> None:
        """Send one message. Raises `DcpError` in a process forked from the rank."""
        if not self.is_ours:
            raise DcpError(
                f"process {os.getpid()} was forked from rank process {self._pid} and cannot "
                "speak for the rank: use the world's fixtures in the rank itself"
            )
        if self._clock_ahead_s and isinstance(message, Done | At) and message.at_s:
            message = replace(message, at_s=message.at_s - self._clock_ahead_s)
        data = encode(message)
        with self._interrupts.held(), self._sending:
            self._socket.sendall(data)

    def receive(self) -> Message:
        """The next message; waits for it."""
        with self._lock:
            while not self._pending:
                select.select([self._socket], [], [])  # the wait itself may be interrupted
                with self._interrupts.held():
                    self._read()
            return self._pending.pop(0)

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except ConnectionResetError:  # the controller ended before it had read everything
            data = b""
        if not data:
            raise ControllerGoneError("the controller closed the report socket")
        self._pending = self._decoder.feed(data)

    def receive_order(self) -> Message:
        """The next order; waits for it, and is not interrupted.

        Skips replies that an interrupted phase did not wait for.
        """
        with self._interrupts.unheard():
            while isinstance(message := self.receive(), Met | DebugAnswer | FaultAnswer):
                pass
            return message

    def answer(self, result: Done) -> Message:
        """Answer inside a phase, and wait for the next order; neither is interrupted."""
        with self._interrupts.unheard():
            self.send(result)
            return self.receive_order()

    def put_back(self, message: Message) -> None:
        """Have `receive` return this message next: it is for another reader."""
        self._pending.insert(0, message)

    @property
    def has_order(self) -> bool:
        """Whether the controller has already sent the next order."""
        return bool(self._pending)

    def ask(self, message: Message, reply: type[M]) -> M:
        """Send a message and wait for its reply."""
        with self._lock:
            self.send(message)
            answer = self.receive()
        if not isinstance(answer, reply):
            raise DcpError(f"expected {reply.__name__} from the controller, got {answer!r}")
        return answer
