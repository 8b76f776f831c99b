"""A connection that serves one operation after another."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, Head, Mode

HELLO = Frame(FrameKind.HELLO, segments=[b"secret"])
VALUE = Frame(FrameKind.VALUE, Head(1, Mode.AGREE, "write"))
Ends = tuple[Connection, Connection]


@pytest.fixture
def ends() -> Iterator[Ends]:
    here, there = map(Connection, socket.socketpair())
    yield here, there
    here.close()
    there.close()


def say(connection: Connection, *frames: Frame) -> None:
    for frame in frames:
        connection.queue(frame)
    assert connection.flush()


def heard(connection: Connection) -> list[FrameKind]:
    connection.receive()
    kinds = [frame.kind for frame in connection.frames]
    connection.frames.clear()
    return kinds


def test_a_later_message_waits_until_this_end_has_finished_the_operation(ends: Ends) -> None:
    here, there = ends
    say(there, VALUE)
    there.finish()
    say(there, HELLO)
    assert heard(here) == [FrameKind.VALUE]
    assert here.has_left
    assert here.over
    here.finish()
    assert not here.over
    assert heard(here) == [FrameKind.HELLO]


def test_messages_of_an_operation_that_this_end_has_left_are_dropped(ends: Ends) -> None:
    here, there = ends
    here.finish()
    say(there, VALUE, VALUE)
    assert heard(here) == []
    there.finish()
    say(there, HELLO)
    assert heard(here) == [FrameKind.HELLO]
    assert not here.over


def test_both_ends_may_run_ahead_by_several_operations(ends: Ends) -> None:
    here, there = ends
    for _ in range(3):
        say(here, HELLO)
        here.finish()
    for _ in range(3):
        assert heard(there) == [FrameKind.HELLO]
        there.finish()
    say(there, VALUE)
    assert heard(here) == [FrameKind.VALUE]


def test_a_hang_up_is_no_end_of_a_process(ends: Ends) -> None:
    here, there = ends
    here.finish()
    there.hang_up()
    here.receive()
    assert here.closed
    assert here.hung_up
    assert here.end_reason is None


def test_a_connection_that_breaks_is_one(ends: Ends) -> None:
    here, there = ends
    there.finish()
    there.close()
    here.finish()
    here.receive()
    assert here.closed
    assert here.end_reason == "connection closed"
