"""Where gloo listens, as its own key in the store says, and tries that gloo does not notice."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined] # re-exported by torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from pytest_dcp._engine.coordinate import probe as probe_module
from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.gloo_listener import GlooListener, parse_listener
from pytest_dcp._engine.coordinate.presence import Presence
from pytest_dcp._engine.coordinate.probe import QuietProbe
from pytest_dcp._engine.coordinate.unjoined_ranks import Absence

HOST = "127.0.0.1"
LIMIT_S = 10.0


def value_of(
    ip: str = "10.0.0.1", port: int = 4711, *, name: bytes = b"vm", size: int = 2, tail: bytes = b""
) -> bytes:
    """As gloo writes it; the rest of a sockaddr_storage is garbage from gloo's stack."""
    if ":" in ip:
        packed = struct.pack("=H", 10) + struct.pack("!HI", port, 0)
        packed += socket.inet_pton(socket.AF_INET6, ip)
    else:
        packed = struct.pack("=H", 2) + struct.pack("!H", port) + socket.inet_aton(ip)
    address = packed.ljust(128, b"\xaa") + b"\xff" * 8
    return (
        struct.pack("=Q", len(name))
        + name
        + struct.pack("=Q", len(address))
        + address
        + struct.pack(f"={size}q", *range(size))
        + tail
    )


@pytest.mark.parametrize("ip", ["10.0.0.1", "127.0.0.1", "2001:db8::1", "::1"])
def test_host_and_port_are_read(ip: str) -> None:
    assert parse_listener(value_of(ip, 29500), 2) == GlooListener(ip, 29500)


WELL_FORMED = value_of()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 178,
        WELL_FORMED[:-1],
        value_of(tail=b"\0" * 8),
        value_of(size=0),  # as of a group that connects lazily
        value_of(size=3),
        value_of(port=0),
        value_of("0.0.0.0"),
        value_of("::"),
        value_of("fe80::1"),
        value_of("::ffff:10.0.0.1"),
        value_of("224.0.0.1"),
        value_of(name=b"v" * 256),
        WELL_FORMED.replace(struct.pack("=Q", 136), struct.pack("=Q", 128)),
        WELL_FORMED.replace(b"\xff" * 8, b"\x00" * 8),
        WELL_FORMED.replace(struct.pack("=H", 2) + struct.pack("!H", 4711), b"\x01\x00/tm"),
    ],
)
def test_a_value_that_gloo_does_not_write_is_unknown(value: bytes) -> None:
    assert parse_listener(value, 2) is None


def test_every_cut_of_a_value_is_unknown() -> None:
    assert not any(parse_listener(WELL_FORMED[:n], 2) for n in range(len(WELL_FORMED)))


def test_gloo_itself_writes_so(tmp_path: Path) -> None:
    """A group of one rank: its socket is open as long as the group is."""
    store = FileStore(str(tmp_path / "store"), 1)
    group: Any = dist.ProcessGroupGloo(store, 0, 1, timeout=timedelta(seconds=30))
    found = parse_listener(store.get("0/0"), 1)
    assert found is not None
    with socket.create_connection((found.host, found.port), timeout=LIMIT_S):
        pass
    assert try_until_ended(QuietProbe(found, leads_there=True), 0.2) is None
    del group
    assert try_until_ended(QuietProbe(found, leads_there=True), LIMIT_S) is not None


@pytest.mark.parametrize("backend", ["fake", "none"])
def test_a_group_without_gloo_is_unknown(backend: str, tmp_path: Path) -> None:
    """Only gloo leaves an address: ranks of other groups are waited for."""
    if backend == "fake":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    else:  # gloo's keys are where this group has its own
        store = FileStore(str(tmp_path / "store"), 1)
        store.set("0//cpu//0/0", "of another kind")
        dist.init_process_group(
            "gloo", store=FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
        )
    try:
        group = dist.group.WORLD
        assert group is not None
        assert rendezvous.gloo_listener_of(group, 1) is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("own", "other", "shown"),
    [
        ("10.0.0.2", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),  # it was the other that connected
        ("2001:db8::2", "2001:db8::1", True),
        ("10.0.0.2", "2001:db8::1", False),
    ],
)
def test_the_rank_of_the_higher_address_has_connected(own: str, other: str, shown: bool) -> None:
    assert GlooListener(own, 1).can_reach(GlooListener(other, 2)) is shown


# Quiet tries.


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    for name in ("CONFIRM_S", "AGAIN_S", "QUIET_LATER_S"):
        monkeypatch.setattr(probe_module, name, 0.02)
    monkeypatch.setattr(probe_module, "REFUSED_S", 0.0)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0), backlog=64) as opened:
        opened.setblocking(False)
        yield opened


def try_until_ended(probe: QuietProbe, time_s: float) -> str | None:
    end_s = time.monotonic() + time_s
    try:
        while time.monotonic() < end_s:
            if (how := probe.look()) is not None:
                return how
            time.sleep(0.002)
        return None
    finally:
        probe.close()


def probe_of(listener: socket.socket, *, leads_there: bool = True) -> QuietProbe:
    return QuietProbe(GlooListener(HOST, listener.getsockname()[1]), leads_there=leads_there)


def test_one_that_listens_has_not_ended_and_accepts_nothing(listener: socket.socket) -> None:
    assert try_until_ended(probe_of(listener), 0.3) is None
    time.sleep(0.3)  # longer than an acknowledgement can be delayed
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_an_address_that_leads_to_the_rank_and_refuses_is_of_one_that_ended(
    listener: socket.socket,
) -> None:
    probe = probe_of(listener)
    listener.close()
    how = try_until_ended(probe, LIMIT_S)
    assert how is not None
    assert "its process has ended, or it has destroyed the process group" in how


def test_an_address_that_took_a_connection_before_leads_to_the_rank(
    listener: socket.socket,
) -> None:
    probe = probe_of(listener, leads_there=False)
    assert probe.look() is None
    listener.close()
    assert try_until_ended(probe, LIMIT_S) is not None


def test_a_refusal_of_an_address_that_may_lead_elsewhere_is_never_believed(
    listener: socket.socket,
) -> None:
    probe = probe_of(listener, leads_there=False)
    listener.close()
    assert try_until_ended(probe, 0.3) is None


def test_a_refusal_that_does_not_last_says_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "CONFIRM_S", 0.3)
    probe, where = probe_of(listener), listener.getsockname()
    listener.close()
    assert probe.look() is None
    with socket.create_server(where):
        assert try_until_ended(probe, 0.6) is None


@pytest.mark.parametrize("error", [errno.ECONNRESET, errno.EHOSTUNREACH, errno.ETIMEDOUT])
def test_other_errors_say_nothing(
    listener: socket.socket, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(socket.socket):
        def connect_ex(self, address: object) -> int:
            return error

    monkeypatch.setattr(socket, "socket", Failing)
    assert try_until_ended(probe_of(listener), 0.2) is None


def test_a_try_without_descriptors_says_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", exhausted)
    assert try_until_ended(probe_of(listener), 0.1) is None


# One rank of a group.


@dataclass
class Group:
    """A group of which this is rank 0; the ranks' gloo addresses."""

    listeners: list[GlooListener | None]

    def size(self) -> int:
        return len(self.listeners)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    group = Group([GlooListener(HOST, 1)])
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(rendezvous, "presence_of", lambda *_: None)
    monkeypatch.setattr(rendezvous, "gloo_listener_of", lambda _, rank: group.listeners[rank])
    return group


def listen_at(host: str) -> tuple[socket.socket, GlooListener]:
    opened = socket.create_server((host, 0), backlog=64)
    return opened, GlooListener(host, opened.getsockname()[1])


def look_until_ended(group: Any, rank: int, time_s: float) -> str | None:
    with contextlib.closing(Absence(group, rank)) as absence:
        end_s = time.monotonic() + time_s
        while time.monotonic() < end_s:
            if (how := absence.look()) is not None:
                return how
            time.sleep(0.002)
    return None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_rank_that_listens_where_gloo_did_is_waited_for(group: Group, host: str) -> None:
    opened, place = listen_at(host)
    group.listeners.append(place)
    with opened:
        assert look_until_ended(group, 1, 0.2) is None


def test_a_rank_of_the_same_address_has_ended(group: Group) -> None:
    opened, place = listen_at(HOST)
    opened.close()
    group.listeners.append(place)
    assert look_until_ended(group, 1, LIMIT_S) is not None


HIGHER = "127.0.0.2"
"""Of a rank that connected to this one: nothing has gone the other way."""


@pytest.mark.parametrize("neighbour", ["dead", "elsewhere", "unknown"])
def test_nothing_is_said_of_a_rank_whose_address_nothing_has_answered_at(
    group: Group, neighbour: str
) -> None:
    gone, place = listen_at(HIGHER)
    gone.close()
    opened, beside = listen_at("127.0.0.3" if neighbour == "elsewhere" else HIGHER)
    group.listeners += [place, None if neighbour == "unknown" else beside]
    if neighbour == "dead":
        opened.close()
    with opened:
        assert look_until_ended(group, 1, 0.3) is None


def test_a_neighbour_that_answers_at_the_same_address_shows_where_it_leads(group: Group) -> None:
    gone, place = listen_at(HIGHER)
    gone.close()
    opened, beside = listen_at(HIGHER)
    group.listeners += [place, beside]
    with opened:
        assert look_until_ended(group, 1, LIMIT_S) is not None
        assert look_until_ended(group, 2, 0.2) is None


def test_a_rank_that_gloo_left_no_address_of_is_waited_for(group: Group) -> None:
    group.listeners.append(None)
    assert look_until_ended(group, 1, 0.1) is None


def test_a_rank_is_looked_at_anew_once_it_said_where_it_listens(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own word counts for more than gloo's."""
    opened, place = listen_at(HOST)
    group.listeners.append(GlooListener(HOST, 1))
    presence = replace(Presence.own(), scope="another machine", hosts=(HOST,), port=place.port)
    monkeypatch.setattr(probe_module, "CONFIRM_S", 0.3)
    with opened, contextlib.closing(Absence(group, 1)) as absence:  # type: ignore[arg-type]
        assert absence.look() is None
        monkeypatch.setattr(rendezvous, "presence_of", lambda *_: presence)
        end_s = time.monotonic() + 0.6
        while time.monotonic() < end_s:
            assert absence.look() is None
            time.sleep(0.002)
