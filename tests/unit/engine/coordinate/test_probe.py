"""Whether a process of another machine has ended, judged by its listening socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from pytest_dcp._engine.coordinate import probe as probe_module
from pytest_dcp._engine.coordinate.probe import Probe

HOST = "127.0.0.1"
LIMIT_S = 10.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No try takes long, but for a first refusal, which is believed late."""
    for name in ("CONFIRM_S", "AGAIN_S", "LATER_S", "CONNECT_S"):
        monkeypatch.setattr(probe_module, name, 0.02)
    monkeypatch.setattr(probe_module, "REFUSED_S", 3600.0)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """One that accepts nothing, as a process that is stopped."""
    with socket.create_server((HOST, 0), backlog=64) as opened:
        yield opened


@pytest.fixture
def probe(listener: socket.socket) -> Iterator[Probe]:
    made = Probe(HOST, listener.getsockname()[1])
    yield made
    made.close()


def look_for(probe: Probe, time_s: float) -> str | None:
    end_s = time.monotonic() + time_s
    while time.monotonic() < end_s:
        if (how := probe.look()) is not None:
            return how
        time.sleep(0.002)
    return None


def test_a_process_that_listens_has_not_ended_however_busy_it_is(probe: Probe) -> None:
    assert look_for(probe, 0.3) is None


def test_a_process_that_listened_and_refuses_has_ended(
    probe: Probe, listener: socket.socket
) -> None:
    assert look_for(probe, 0.2) is None
    listener.close()
    how = look_for(probe, LIMIT_S)
    assert how is not None
    assert HOST in how


def test_a_first_refusal_is_believed_when_it_stays(
    probe: Probe, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener.close()
    assert look_for(probe, 0.2) is None
    monkeypatch.setattr(probe_module, "REFUSED_S", 0.1)
    assert look_for(probe, LIMIT_S) is not None


def test_a_full_queue_says_nothing(probe: Probe, listener: socket.socket) -> None:
    listener.listen(0)
    crowd = [socket.socket() for _ in range(4)]
    for sock in crowd:
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())
    assert look_for(probe, 0.3) is None
    for sock in crowd:
        sock.close()


def test_an_address_that_cannot_be_reached_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "REFUSED_S", 0.0)
    unreachable = Probe("240.0.0.1", 1)
    assert look_for(unreachable, 0.2) is None
    unreachable.close()


def test_a_port_that_the_kernel_lends_to_the_try_itself_is_refused(
    probe: Probe, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = listener.getsockname()
    assert look_for(probe, 0.2) is None
    listener.close()

    class Lent(socket.socket):
        def connect_ex(self, address: object) -> int:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(where)
            return super().connect_ex(where)

    monkeypatch.setattr(socket, "socket", Lent)
    assert look_for(probe, LIMIT_S) is not None
