"""The listening socket of a process: connections accepted, refused and left open."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import pytest

from pytest_dcp._engine.coordinate import connection as connection_module
from pytest_dcp._engine.coordinate import idle_connections, peer_side
from pytest_dcp._engine.coordinate import peer_listener as peer_listener_module
from pytest_dcp._engine.coordinate.authentication import GroupKey, new_nonce
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.descriptors import make_room_for
from pytest_dcp._engine.coordinate.failure import Cause, CoordinationError
from pytest_dcp._engine.coordinate.frame import Frame, FrameKind, encode
from pytest_dcp._engine.coordinate.hello import IDLE, Address, Hello
from pytest_dcp._engine.coordinate.idle_connections import Link, connect
from pytest_dcp._engine.coordinate.machines import local_only
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder
from pytest_dcp._engine.coordinate.peer_listener import (
    HELLO_BYTES,
    HELLO_S,
    STRANGERS,
    PeerListener,
)

FIRST = Hello("group", "save", 1, 2)
LIMIT_S = 10.0
T = TypeVar("T")


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerListener]:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    opened = PeerListener()
    opened.open("group", "save")
    yield opened
    opened.close()


def until(found: Callable[[], T]) -> T:
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        if value := found():
            return value
        time.sleep(0.001)
    raise TimeoutError


def send(listener: PeerListener, pieces: list[bytes]) -> socket.socket:
    sock = connect(listener.address)
    sock.sendall(b"".join(pieces))
    return sock


def fresh(**facts: Any) -> Hello:
    """A greeting that was never said."""
    return replace(FIRST, nonce=new_nonce(), **facts)


def hello(listener: PeerListener, said: Hello | None = None) -> list[bytes]:
    said = said or fresh()
    return [bytes(piece) for piece in encode(said.frame(listener.address.key()))]


def is_closed(sock: socket.socket, listener: PeerListener) -> bool:
    sock.setblocking(False)

    def ended() -> bool:
        assert listener.arrivals("group", "save") == []
        try:
            return sock.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    try:
        return bool(until(ended))
    finally:
        sock.close()


def test_a_peer_with_the_secret_arrives(listener: PeerListener) -> None:
    said = fresh()
    with send(listener, hello(listener, said)) as sock:
        (arrival,) = until(lambda: listener.arrivals("group", "save"))
        assert arrival.hello == said
        assert listener.address.secret.encode() not in b"".join(hello(listener, said))
        arrival.connection.queue(listener.welcome(said))
        arrival.connection.flush()
        assert listener.address.key().welcome(said.nonce) in sock.recv(1000)
        arrival.connection.close()


def test_a_hello_that_was_said_before_is_shut_out(listener: PeerListener) -> None:
    data = hello(listener)
    with send(listener, data):
        (arrival,) = until(lambda: listener.arrivals("group", "save"))
        assert is_closed(send(listener, data), listener)
        arrival.connection.close()


@pytest.mark.parametrize(
    "facts",
    [
        *({"rank": "2"}, {"rank": [2]}, {"number": 1.5}, {"operation": None}, {"nonce": 7}),
        *(
            {"subject": (1, 2)},
            {"subject": ("a",)},
            {"unordered": 1},
            {"epoch": None},
            {"group": 0},
        ),
    ],
)
def test_a_hello_with_facts_of_other_types_is_shut_out(
    listener: PeerListener, facts: dict[str, Any]
) -> None:
    wrong = replace(fresh(), **facts)
    assert is_closed(send(listener, hello(listener, wrong)), listener)


def test_a_rank_has_no_more_connections_than_it_may(
    listener: PeerListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_listener_module, "WAITING_OF_A_RANK", 3)
    listener.open("group", "load")
    socks = [send(listener, hello(listener, fresh(operation="load"))) for _ in range(5)]
    assert is_closed(socks[4], listener)
    arrivals = listener.arrivals("group", "load")
    assert len(arrivals) == 3
    for one in [*(arrival.connection for arrival in arrivals), *socks[:4]]:
        one.close()


def test_a_hello_may_come_in_pieces_and_with_the_next_frame(listener: PeerListener) -> None:
    data = b"".join(hello(listener)) + b"".join(map(bytes, encode(Frame(FrameKind.PING))))
    with send(listener, [data[:10]]) as sock:
        time.sleep(0.02)
        assert listener.arrivals("group", "save") == []
        assert listener.has_unsignalled_peers()
        sock.sendall(data[10:])
        (arrival,) = until(lambda: listener.arrivals("group", "save"))
        arrival.connection.close()


def test_a_peer_with_another_secret_is_shut_out(listener: PeerListener) -> None:
    frame = fresh().frame(GroupKey.of("0" * 32))
    assert is_closed(send(listener, [bytes(piece) for piece in encode(frame)]), listener)


def test_a_stranger_is_shut_out(listener: PeerListener) -> None:
    assert is_closed(send(listener, [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]), listener)


def test_a_hello_that_is_too_long_is_shut_out(listener: PeerListener) -> None:
    long = fresh(operation="s" * HELLO_BYTES)
    assert is_closed(send(listener, hello(listener, long)), listener)


@pytest.mark.parametrize(
    "frame", [Frame(FrameKind.PING), Frame(FrameKind.VALUE, segments=[b"x"]), Frame(FrameKind.BYE)]
)
def test_nothing_but_a_hello_comes_first(listener: PeerListener, frame: Frame) -> None:
    data = [bytes(piece) for piece in encode(frame)]
    assert is_closed(send(listener, data * 100), listener)


def test_a_hello_of_many_segments_is_shut_out(listener: PeerListener) -> None:
    frame = Frame(FrameKind.HELLO, segments=[b""] * 8)
    assert is_closed(send(listener, [bytes(piece) for piece in encode(frame)]), listener)


def test_a_stranger_that_says_nothing_is_shut_out(listener: PeerListener) -> None:
    began_s = time.monotonic()
    assert is_closed(send(listener, []), listener)
    assert time.monotonic() - began_s >= HELLO_S / 2


def test_a_crowd_of_strangers_is_kept_small_and_lets_peers_through(
    listener: PeerListener,
) -> None:
    idle = [connect(listener.address) for _ in range(3 * STRANGERS)]
    with send(listener, hello(listener)):
        idle += [connect(listener.address) for _ in range(3 * STRANGERS)]
        (arrival,) = until(lambda: listener.arrivals("group", "save"))
        assert (arrival.hello.group, arrival.hello.rank) == ("group", 2)
        assert len(listener._handshaking) <= STRANGERS
        arrival.connection.close()
    for sock in idle:
        sock.close()


def test_a_peer_that_sends_without_end_is_read_a_part_at_a_time(
    listener: PeerListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = socket.socketpair()
    there.sendall(b"".join(map(bytes, encode(Frame(FrameKind.PING)))) * 1000)
    monkeypatch.setattr(connection_module, "READS_AT_ONCE", 10)
    line = Connection(here)
    line.receive()
    assert here.recv(1, socket.MSG_PEEK)
    line.close()
    there.close()


def test_a_hello_with_other_facts_is_shut_out(listener: PeerListener) -> None:
    text = b'{"group": "group"}'
    frame = Frame(FrameKind.HELLO, segments=[listener.address.key().proof(text), text])
    assert is_closed(send(listener, [bytes(piece) for piece in encode(frame)]), listener)


def test_peers_wait_for_the_operation_that_they_ask_for(listener: PeerListener) -> None:
    listener.open("group", "load")
    with send(listener, hello(listener, fresh(operation="load"))):
        with pytest.raises(TimeoutError):
            short_until(lambda: listener.arrivals("group", "save"))
        (arrival,) = listener.arrivals("group", "load")
        arrival.connection.close()


def test_peers_that_ask_for_an_unknown_operation_are_seen_by_present_ranks(
    listener: PeerListener,
) -> None:
    with send(listener, hello(listener, fresh(operation="load"))):
        (arrival,) = until(lambda: listener.arrivals("group", "save"))
        arrival.connection.close()


def short_until(found: Callable[[], object]) -> None:
    for _ in range(50):
        if found():
            return
        time.sleep(0.001)
    raise TimeoutError


def broken(listener: PeerListener, rank: int = 2) -> str | None:
    assert listener.arrivals("group", "save") == []
    return listener.broken_connection("group", rank)


def test_an_idle_connection_that_breaks_shows_that_a_process_ended(
    listener: PeerListener,
) -> None:
    sock = send(listener, hello(listener, fresh(operation=IDLE)))
    with pytest.raises(TimeoutError):
        short_until(lambda: broken(listener))
    sock.close()
    assert until(lambda: broken(listener)) == "connection closed"
    assert broken(listener, rank=1) is None


def test_a_connection_that_a_peer_closes_on_purpose_shows_no_end(
    listener: PeerListener,
) -> None:
    line = Connection(send(listener, hello(listener, fresh(operation=IDLE))))
    with pytest.raises(TimeoutError):
        short_until(lambda: broken(listener))
    line.hang_up()
    for _ in range(20):
        time.sleep(0.001)
        assert broken(listener) is None


def test_a_fork_keeps_no_line_open(listener: PeerListener) -> None:
    line = Connection(connect(listener.address))
    inside, outside = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(outside, str(line.fileno()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(inside, 10) == b"-1"
    assert line.fileno() >= 0
    line.close()
    os.close(inside)
    os.close(outside)


def test_an_address_survives_the_store() -> None:
    address = Address(("10.0.0.1", "node-1"), 29500, "m", "s", "c")
    assert Address.decode(address.encode().encode()) == address


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"{}", b"\x80\x04.", b"[" * 70_000, b'{"hosts": 1}'),
        Address(("h",), 1, "m", "s", "c").encode().replace("1", '"1"').encode(),
        Address((7,), 1, "m", "s", "c").encode().encode(),  # type: ignore[arg-type]
    ],
)
def test_bytes_that_are_no_address_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="expected a coordinator's address"):
        Address.decode(data)


@pytest.mark.parametrize(
    ("environ", "local"),
    [
        ({}, False),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, True),
    ],
)
def test_only_worlds_of_one_machine_listen_on_the_loopback_alone(
    environ: dict[str, str], local: bool
) -> None:
    assert local_only(environ) is local


def test_another_machines_ranks_are_found_by_its_addresses(listener: PeerListener) -> None:
    elsewhere = replace(listener.address, machine="another", hosts=("127.0.0.1",))
    connect(elsewhere).close()
    with pytest.raises(OSError, match="refused"):
        connect(replace(elsewhere, port=1))


@pytest.fixture
def nobodys(listener: PeerListener) -> Address:
    """Where a coordinator of this machine was, and has ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return replace(listener.address, hosts=(socket.gethostname(),), port=port)


def test_no_resolver_is_asked_for_a_coordinator_of_this_machine_that_has_ended(
    nobodys: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> NoReturn:
        pytest.fail("a resolver was asked")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pytest.raises(ConnectionRefusedError):
        connect(nobodys)


def full_queue(listener: socket.socket) -> list[socket.socket]:
    """Connections that are never accepted, until the listener's queue is full."""
    waiting = []
    while True:
        sock = socket.socket()
        sock.settimeout(0.2)
        waiting.append(sock)
        try:
            sock.connect(listener.getsockname())
        except TimeoutError:
            return waiting


def test_a_coordinator_with_a_full_queue_is_waited_for(
    listener: PeerListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle_connections, "CONNECT_S", 0.3)
    place = CallOrder().take("save", None)
    group: Any = object()
    waiter = peer_side.PeerSide(OperationContext(1, 2, 0, "save", 60.0, group, place))
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        address = replace(listener.address, port=server.getsockname()[1])
        monkeypatch.setattr(peer_side.rendezvous, "look_up", lambda *_: address)
        crowd = full_queue(server)
        with pytest.raises(TimeoutError):
            connect(address)
        late = waiter._find(time.monotonic() + 0.5, "plan")
        assert isinstance(late, Cause)
        assert late.type_name.endswith("RankSilentError")

        def accept() -> None:
            time.sleep(0.5)
            for _ in crowd:
                with contextlib.suppress(TimeoutError):
                    server.accept()[0].close()

        server.settimeout(1.0)
        thread = threading.Thread(target=accept)
        thread.start()
        found = waiter._find(time.monotonic() + LIMIT_S, "plan")
        thread.join()
        assert isinstance(found, Link)
        found.connection.close()
        for one in crowd:
            one.close()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limits of descriptors, in the order in which they were set."""
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    return limits


def test_the_soft_limit_of_descriptors_grows_with_the_peers(
    limits: list[tuple[int, int]],
) -> None:
    make_room_for(100)
    assert len(limits) == 1
    make_room_for(1000)
    make_room_for(4000)
    assert limits[1:] == [(1512, 4096), (4096, 4096)]


def test_a_hard_limit_that_is_too_low_is_named(limits: list[tuple[int, int]]) -> None:
    with pytest.raises(CoordinationError, match=r"only 4096 .* `ulimit -n 9512` before"):
        make_room_for(9000)
    assert limits[1:] == [(4096, 4096)]


@pytest.mark.parametrize("hosts", [(), ("127.0.0.1",)])
def test_a_socket_with_the_port_of_an_ended_process_does_not_meet_itself(
    nobodys: Address, monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...]
) -> None:
    class Lent(socket.socket):
        def connect(self, address: Any) -> None:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Lent)
    with pytest.raises(ConnectionRefusedError):
        connect(replace(nobodys, hosts=hosts))


def test_a_copy_of_this_machine_is_found_by_its_numeric_address(
    listener: PeerListener,
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as elsewhere:
        port = elsewhere.getsockname()[1]
        copy = replace(listener.address, hosts=(socket.gethostname(), "127.0.0.2"), port=port)
        with connect(copy) as sock:
            assert sock.getpeername() == ("127.0.0.2", port)
