"""How the processes of an outer launcher find the controller: the launcher's store, addresses.

Enters: an `OuterLaunch`. Leaves: in rank 0, a listening socket whose address the store holds; in
the others, a connection to it. The store is torch's `TCPStore` at MASTER_ADDR and MASTER_PORT, as
for torch's own `env://`: torchrun's agent has one there, or rank 0 opens it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pytest_dcp._harness.outer.environment import OuterLaunch
from pytest_dcp._harness.outer.seat_link import watch_machine
from pytest_dcp._harness.outer.seat_messages import JOIN_S
from pytest_dcp.errors import WorldError

SIOCGIFADDR = 0x8915  # linux/sockios.h
ASK_S = 0.05
"""Between two looks at the store."""
CONNECT_S = 10.0
BACKLOG = 1024


class MeetingError(WorldError):
    """The processes of the launcher did not find each other; the text is for the user."""


@dataclass(frozen=True, slots=True)
class ControllerAddress:
    """What rank 0 publishes."""

    hosts: tuple[str, ...]
    """Its addresses, best first."""
    port: int
    token: str
    probe: str
    """A file in its folder, to find out who else sees it."""

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ControllerAddress:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        return ControllerAddress(**{**raw, "hosts": tuple(raw["hosts"])})


class LaunchStore:
    """The store that all processes of the launcher reach."""

    def __init__(self, launch: OuterLaunch) -> None:
        import torch.distributed as dist

        self._launch = launch
        self._prefix = f"pytest_dcp/{launch.run_id}"
        try:
            self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]  # public, not in __all__
                launch.master_addr,
                launch.master_port,
                is_master=launch.rank == 0 and not launch.has_agent_store,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=JOIN_S),
            )
        except Exception as error:
            where = f"{launch.master_addr}:{launch.master_port}"
            raise MeetingError(
                f"rank {launch.rank} of {launch.launcher} did not reach the store at MASTER_ADDR "
                f"and MASTER_PORT, {where}: {error}"
            ) from error

    @property
    def url(self) -> str:
        """For worlds: `tcp://host:port/prefix`."""
        host = self._launch.master_addr
        host = f"[{host}]" if ":" in host else host
        return f"tcp://{host}:{self._launch.master_port}/{self._prefix}/{self._launch.attempt}"

    def publish(self, address: ControllerAddress) -> None:
        """Let the other ranks find rank 0."""
        self._store.set(self._key("controller"), address.to_json())

    def await_address(self) -> ControllerAddress:
        """Where rank 0 is. Raises `MeetingError` when it does not say so within `JOIN_S`."""
        deadline = time.monotonic() + JOIN_S
        while not self._store.check([self._key("controller")]):
            if time.monotonic() >= deadline:
                raise MeetingError(
                    f"rank 0 of {self._launch.launcher} began no session with worlds within "
                    f"{JOIN_S:g} s: did it collect the same tests?"
                )
            time.sleep(ASK_S)
        return ControllerAddress.from_json(self._store.get(self._key("controller")).decode())

    def keep_verdict(self, code: int) -> None:
        """Remember, for restarts of the ranks, that the tests have failed."""
        self._store.set(f"{self._prefix}/verdict", str(code))

    def earlier_verdict(self) -> int | None:
        """The exit code of a session that ran before torchrun restarted the ranks."""
        key = f"{self._prefix}/verdict"
        return int(self._store.get(key)) if self._store.check([key]) else None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{self._launch.attempt}/{name}"


def listen(launch: OuterLaunch) -> tuple[socket.socket, tuple[str, ...]]:
    """A listening socket of rank 0, and the addresses at which others reach it, best first."""
    if launch.is_local:
        return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG), ("127.0.0.1",)
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
            return listener, own_addresses(launch)
    return socket.create_server(("", 0), backlog=BACKLOG), own_addresses(launch)


def own_addresses(launch: OuterLaunch) -> tuple[str, ...]:
    """This machine's addresses for the others: the one that routes to the master, and the master's
    name, by which they have found the store.
    """
    hosts = [launch.master_addr]
    with contextlib.suppress(OSError):
        address = (launch.master_addr, launch.master_port)
        family, kind, *_, where = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # sends nothing; only asks the kernel for the route
            own = probe.getsockname()[0]
        if not own.startswith("127.") and own != "::1":
            hosts.insert(0, own)
    return tuple(dict.fromkeys(hosts))


def connect(
    address: ControllerAddress,
    launch: OuterLaunch,
    create: Callable[..., socket.socket] = socket.create_connection,
) -> socket.socket:
    """A connection to rank 0. Raises `MeetingError` when none of its addresses answers."""
    errors = []
    for host in address.hosts:
        try:
            sock = create((host, address.port), CONNECT_S)
        except OSError as error:
            errors.append(f"{host}:{address.port}: {error}")
        else:
            watch_machine(sock)
            return sock
    raise MeetingError(
        f"rank {launch.rank} of {launch.launcher} cannot reach rank 0 ({'; '.join(errors)})"
    )


def machine_name() -> str:
    """Equal in processes that share a kernel, and so a clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def interface_of(address: str) -> str:
    """The network interface with this address of this machine; empty if there is none."""
    if address.startswith("127.") or address == "::1":
        return "lo"
    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _interface_of_ipv6(address: str) -> str:
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            fields = line.split()
            if fields[0] == packed:
                return fields[5]
    return ""


def process_name() -> str:
    """This process, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"
