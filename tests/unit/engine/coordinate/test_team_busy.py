"""A busy, full or unreachable peer is waited for, not taken for dead; limits of descriptors."""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest

from pytest_dcp._engine.coordinate import idle_connections, peer_listener, peer_side
from pytest_dcp._engine.coordinate.coordinator_side import FULL_S, CoordinatorSide
from pytest_dcp._engine.coordinate.failure import Cause, CoordinationError
from pytest_dcp._engine.coordinate.hello import Address
from pytest_dcp._engine.coordinate.idle_connections import Link, connect
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder
from pytest_dcp._engine.coordinate.peer_listener import PeerListener

LIMIT_S = 10.0
ADDRESS = Address(("10.0.0.1",), 29500, "another machine", "secret")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> peer_side.PeerSide:
    """A peer that knows where its coordinator is."""
    monkeypatch.setattr(peer_side.rendezvous, "look_up", lambda *_: ADDRESS)
    monkeypatch.setattr(peer_side.rendezvous, "forget", lambda *_: None)
    group: Any = object()
    return peer_side.PeerSide(
        OperationContext(1, 2, 0, "save", 60.0, group, CallOrder().take("save", None))
    )


def fails_first(errors: list[OSError]) -> Callable[[Address], socket.socket]:
    """Connects after it has raised these, one at each try."""

    def connect(_: Address) -> socket.socket:
        if errors:
            raise errors.pop(0)
        return socket.socket()

    return connect


def found(peer: peer_side.PeerSide, within_s: float = LIMIT_S) -> Link | Cause:
    result = peer._find(time.monotonic() + within_s, "plan")
    if isinstance(result, Link):
        result.connection.close()
    return result


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT])
def test_a_network_that_recovers_is_waited_for(
    peer: peer_side.PeerSide, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(peer_side, "REFUSED_S", 0.0)
    monkeypatch.setattr(peer_side, "AGAIN_S", 0.01)
    errors = [OSError(number, os.strerror(number)) for _ in range(3)]
    monkeypatch.setattr(peer_side, "connect", fails_first(errors))
    assert isinstance(found(peer), Link)


def test_a_network_that_stays_down_is_named_and_is_no_death(
    peer: peer_side.PeerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_side, "UNREACHED_S", 0.1)
    monkeypatch.setattr(peer_side, "AGAIN_S", 0.01)
    errors = [OSError(errno.ENETUNREACH, "Network is unreachable")] * 1000
    monkeypatch.setattr(peer_side, "connect", fails_first(errors))
    cause = found(peer)
    assert isinstance(cause, Cause)
    assert cause.type_name.endswith(".RankSilentError")
    assert "cannot be reached from rank 1 in step 'plan' of save: [Errno 101]" in cause.text


def test_an_address_that_stays_refused_is_a_death(
    peer: peer_side.PeerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_side, "REFUSED_S", 0.1)
    monkeypatch.setattr(peer_side, "connect", fails_first([ConnectionRefusedError("no")] * 1000))
    cause = found(peer)
    assert isinstance(cause, Cause)
    assert cause.type_name.endswith(".RankEndedError")


def test_a_refusal_counts_from_the_last_time_that_the_coordinator_was_busy(
    peer: peer_side.PeerSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_side, "REFUSED_S", 0.2)
    refused, busy = ConnectionRefusedError("no"), TimeoutError("busy")
    slow = fails_first([refused, busy, refused, busy, refused])

    def connect_slowly(address: Address) -> socket.socket:
        time.sleep(0.15)
        return slow(address)

    monkeypatch.setattr(peer_side, "connect", connect_slowly)
    assert isinstance(found(peer), Link)


def test_a_host_that_does_not_answer_says_more_than_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The address of the same number on another network may refuse."""
    errors = iter([ConnectionRefusedError("no"), TimeoutError("busy"), OSError("no route")])

    def create(*_: object) -> NoReturn:
        raise next(errors)

    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(TimeoutError, match="busy"):
        connect(Address(("a", "b", "c"), 1, "another machine", "secret"))


def test_a_peer_without_descriptors_fails_itself_and_names_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def create(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(CoordinationError, match=r"Too many open files.*`ulimit -n"):
        connect(ADDRESS)


# A coordinator without descriptors.


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerListener]:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    made = PeerListener()
    made.open("group", "save")
    yield made
    made.close()


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """No descriptor can be opened; the hard limit stays as it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_peers_stay_in_the_queue_while_there_is_no_descriptor(
    opened: PeerListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener, "make_more_room", lambda: False)
    with connect(opened.address):
        with no_descriptor_left():
            assert opened.arrivals("group", "save") == []
            assert opened.full_for_s() > 0.0
        assert opened.arrivals("group", "save") == []
        assert opened.full_for_s() == 0.0
        assert len(opened._handshaking) == 1


def test_the_soft_limit_is_raised_when_it_is_met(opened: PeerListener) -> None:
    with connect(opened.address), no_descriptor_left():
        assert opened.arrivals("group", "save") == []
        assert opened.full_for_s() == 0.0
        opened.arrivals("group", "save")
        assert len(opened._handshaking) == 1


def test_an_operation_that_cannot_accept_its_peers_fails_and_names_the_limit(
    opened: PeerListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = CallOrder().take("save", None)
    coordinator_side = CoordinatorSide(OperationContext(0, 2000, 0, "save", 60.0, None, place))
    coordinator_side._peer_listener = opened
    coordinator_side._find_descriptors()
    monkeypatch.setattr(opened, "_full_s", time.monotonic() - FULL_S - 1)
    with pytest.raises(CoordinationError, match=r"Too many open files.*`ulimit -n 2511`"):
        coordinator_side._find_descriptors()


def test_the_try_of_an_address_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connect waits for longer than the limit of one try."""
    waits: list[float] = []

    def create(_: object, timeout_s: float) -> NoReturn:
        waits.append(timeout_s)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", create)
    with pytest.raises(TimeoutError):
        connect(ADDRESS)
    assert waits == [idle_connections.CONNECT_S]
