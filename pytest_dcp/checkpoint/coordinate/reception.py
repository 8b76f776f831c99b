"""Where the peers of this process's operations arrive: one listening socket per process.

Peers enter by connecting and saying who they are; `arrivals` hands each to the operation that it
asks for. Nothing of a stranger is unpickled: a peer must first show the secret of the address that
only the group's store holds, in one HELLO frame of at most `HELLO_BYTES` and `FEW_SEGMENTS`, within
`HELLO_S` after it was accepted. At most `STRANGERS` connections are open that have not shown it:
the oldest is closed for the next. A peer that is closed so connects again (see spoke), so a flood
of strangers delays an operation and does not fail it.

A peer also keeps one idle line, its tether, from its first operation of a group on: by it the
coordinator knows at once that a rank has died between operations, and will not come.

There is no thread: peers wait in the kernel's queue until the coordinator looks. The socket stays
open until the process ends, so that later operations need no store and no new port.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import json
import os
import resource
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from pytest_dcp.checkpoint.coordinate.frame import MAX_BODY_BYTES, Frame, Kind
from pytest_dcp.checkpoint.coordinate.line import Line
from pytest_dcp.checkpoint.coordinate.sequence import kind_of

HELLO_BYTES = 32768
"""Room for the secret and twice the longest path."""
HELLO_S = 1.0
STRANGERS = 64
ACCEPTED_AT_ONCE = 512
"""In one look, so that a flood does not keep the coordinator from its peers."""
TETHER = ""
"""The operation of a line that only lasts: it breaks when the peer's process ends."""
BACKLOG = 4096
"""Peers that may wait while the coordinator is busy; the kernel cuts it to net.core.somaxconn."""
DESCRIPTORS_BESIDE = 512
"""What a process has open beside its peers' connections."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process's reception is, and how both ends prove that they know it."""

    hosts: tuple[str, ...]
    """In order of trial, for a peer on another machine."""
    port: int
    machine: str
    """Equal for processes that reach each other through the loopback."""
    secret: str
    """Shown by the peer."""
    answer: str
    """Shown by the coordinator."""

    def encode(self) -> str:
        """What the store keeps."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Address:
        """The address in a store's value."""
        facts = json.loads(data)
        return cls(**(facts | {"hosts": tuple(facts["hosts"])}))


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a peer is, and what it is about to do."""

    group: str
    """The group and its coordinator; a process may have several."""
    operation: str
    number: int
    """Of the operation, see sequence."""
    rank: int
    epoch: int = 0
    finished_up_to: int = 0
    """The peer's operations up to this number are over."""
    unordered: bool = False
    subject: tuple[str, str] | None = None
    """The name and the real name of the folder."""

    def frame(self, secret: str) -> Frame:
        """The frame that says so."""
        return Frame(Kind.HELLO, segments=[secret.encode(), json.dumps(asdict(self)).encode()])


@dataclass(frozen=True, slots=True)
class Arrival:
    """A peer that showed the secret."""

    hello: Hello
    line: Line
    came_s: float = field(default_factory=time.monotonic)


class Reception:
    """This process's listening socket and the peers that no operation has taken yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listener = _listen(local_only(os.environ))
        self._lobby: list[tuple[float, Line]] = []
        self._waiting: list[Arrival] = []
        self._tethers: dict[tuple[str, int], Line] = {}
        self._active: Counter[tuple[str, str]] = Counter()
        self.address = Address(
            hosts=_hosts(os.environ),
            port=self._listener.getsockname()[1],
            machine=machine(),
            secret=secrets.token_hex(16),
            answer=secrets.token_hex(16),
        )

    def welcome(self) -> Frame:
        """The first frame to a peer: it shows that this is the coordinator looked for."""
        return Frame(Kind.WELCOME, segments=[self.address.answer.encode()])

    def fileno(self) -> int:
        """The listening socket's, for a selector."""
        return self._listener.fileno()

    def open(self, group: str, kind: str) -> None:
        """Say that an operation of a kind expects peers."""
        with self._lock:
            self._active[group, kind] += 1

    def shut(self, group: str, kind: str) -> None:
        """Say that it expects none any more."""
        with self._lock:
            self._active[group, kind] -= 1
            self._active += Counter()  # drops what is not positive

    def restless(self) -> bool:
        """Whether peers may come without the listening socket telling this operation."""
        return bool(self._lobby) or self._active.total() > 1

    def arrivals(self, group: str, kind: str) -> list[Arrival]:
        """The peers of a group that run this kind of operation, or one that is not run here."""
        with self._lock:
            self._accept()
            self._greet()
            mine: list[Arrival] = []
            others: list[Arrival] = []
            for arrival in self._waiting:
                asked = (arrival.hello.group, kind_of(arrival.hello.operation))
                taken = asked[0] == group and (asked[1] == kind or not self._active[asked])
                (mine if taken else others).append(arrival)
            self._waiting = others
        return mine

    def broken_tether(self, group: str, rank: int) -> str | None:
        """How the process of a rank ended, as far as its tether tells."""
        with self._lock:
            line = self._tethers.get((group, rank))
            if line is None:
                return None
            line.receive()
            if line.left:  # the rank has done with the group, and lives
                line.close()
                del self._tethers[group, rank]
                return None
            return line.ended

    def give_back(self, arrivals: Sequence[Arrival]) -> None:
        """Keep peers for a later operation."""
        with self._lock:
            self._waiting.extend(arrivals)

    def _accept(self) -> None:
        for n in range(1, ACCEPTED_AT_ONCE + 1):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                # Nobody waits, or who waited is gone already. Out of descriptors: they stay queued.
                return
            line = Line(sock)
            line.reader.limit_bytes, line.reader.only = HELLO_BYTES, Kind.HELLO
            self._lobby.append((time.monotonic() + HELLO_S, line))
            if n % STRANGERS == 0:
                self._greet()
            while len(self._lobby) > STRANGERS:
                self._lobby.pop(0)[1].close()

    def _greet(self) -> None:
        staying = []
        for until_s, line in self._lobby:
            line.receive(one=True)
            refused = bool(line.frames)
            hello = self._read_hello(line.frames.popleft()) if line.frames else None
            if hello is not None and hello.operation == TETHER:
                old = self._tethers.pop((hello.group, hello.rank), None)
                if old is not None:
                    old.close()
                line.reader.only = None
                self._tethers[hello.group, hello.rank] = line
            elif hello is not None:
                line.reader.limit_bytes, line.reader.only = MAX_BODY_BYTES, None
                self._waiting.append(Arrival(hello, line))
            elif refused or line.over or time.monotonic() > until_s:
                line.close()
            else:
                staying.append((until_s, line))
        self._lobby = staying

    def _read_hello(self, frame: Frame) -> Hello | None:
        if frame.kind is not Kind.HELLO or len(frame.segments) != 2:
            return None
        if not hmac.compare_digest(bytes(frame.segments[0]), self.address.secret.encode()):
            return None
        try:
            facts = json.loads(bytes(frame.segments[1]))
            subject = facts.get("subject")
            return Hello(**facts | {"subject": None if subject is None else tuple(subject)})
        except (ValueError, TypeError, AttributeError):
            return None

    def close(self) -> None:
        """Close every socket; for the end of the process."""
        self._listener.close()
        waiting = [line for _, line in self._lobby] + [a.line for a in self._waiting]
        for line in [*waiting, *self._tethers.values()]:
            line.close()


_reception: Reception | None = None
_making = threading.Lock()


def reception() -> Reception:
    """This process's reception, opened at the first call."""
    global _reception
    with _making:
        if _reception is None:
            _reception = Reception()
            atexit.register(_reception.close)
        return _reception


def make_room_for(connections: int) -> None:
    """Raise this process's soft limit of descriptors where it is too low for its peers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + DESCRIPTORS_BESIDE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # not allowed: peers stay queued
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _forget_in_child() -> None:
    """A forked child has no peers; its copy of the socket would keep a dead parent's port open."""
    global _reception, _making
    _making = threading.Lock()
    if _reception is not None:
        atexit.unregister(_reception.close)
        with contextlib.suppress(OSError):
            _reception._listener.close()
        _reception = None


os.register_at_fork(after_in_child=_forget_in_child)


def local_only(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's variables say that all ranks are on this machine."""
    if environ.get("MASTER_ADDR") in LOOPBACK:
        return True
    size = environ.get("WORLD_SIZE")
    return size is not None and size == environ.get("LOCAL_WORLD_SIZE")


def machine() -> str:
    """Equal in processes that share a kernel and its network, and so a loopback.

    Copies of one virtual machine may share it, too, and no loopback.
    """
    try:
        return f"{_boot_id()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _listen(loopback: bool) -> socket.socket:
    if loopback:
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    else:
        try:
            listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
        except (OSError, ValueError):  # no IPv6 here
            listener = socket.create_server(("", 0), backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def _hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    """This machine's addresses, best first: the one that the master is reached from, the name."""
    hosts = []
    master = environ.get("MASTER_ADDR")
    if master and master not in LOOPBACK:
        with contextlib.suppress(OSError):
            family, kind, *_, where = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(where)  # sends nothing; only asks the kernel for the route
                hosts.append(probe.getsockname()[0])
    hosts.append(socket.gethostname())
    return tuple(dict.fromkeys(hosts))
