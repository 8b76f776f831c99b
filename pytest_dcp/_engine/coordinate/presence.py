"""A rank's process, and whether it has ended, as far as this machine can tell.

Each rank describes its process in the group's store at its first operation, before it connects to
any other: its pid, its listening address if the ranks are on several machines, and torchrun's error
file. So the others notice within seconds that a rank, or the coordinator, was killed before the two
met. For a process of another machine, container or user, only torchrun's error file, in a folder
that both see, shows that it has ended.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate.machines import LOOPBACK, machine

MAX_ERROR_BYTES = 1 << 20
"""Limit for torchrun's error file: it holds one traceback."""


@dataclass(frozen=True, slots=True)
class Presence:
    """One rank's process."""

    pid: int
    started: str
    """Start time in clock ticks since boot: another process may get the same pid."""
    scope: str
    """Equal in processes that see each other by these pids: machine, pid namespace and user."""
    hosts: tuple[str, ...] = ()
    """Numeric addresses at which it listens, for other machines."""
    port: int = 0
    """0: it does not listen."""
    error_file: str = ""
    """The file in which torchrun records why a worker failed; empty if it existed already."""

    @classmethod
    def own(cls, hosts: Sequence[str] = (), port: int = 0) -> Presence:
        """This process. hosts: numeric addresses only, since resolving a name could take long."""
        pid = os.getpid()
        _, started = _stat_of(pid) or ("", "")
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
        if os.path.exists(error_file):
            error_file = ""
        return cls(pid, started, _scope(), tuple(filter(_is_numeric, hosts)), port, error_file)

    def encode(self) -> str:
        """The value kept in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Presence:
        """The presence in a store's value. Raises ValueError, TypeError or KeyError for others."""
        facts = json.loads(data)
        presence = cls(**(facts | {"hosts": tuple(facts["hosts"])}))
        texts = (presence.started, presence.scope, presence.error_file, *presence.hosts)
        numbers = (presence.pid, presence.port)
        if not ({str}.issuperset(map(type, texts)) and {int}.issuperset(map(type, numbers))):
            raise ValueError(f"expected a rank's description of its process, got {presence!r:.200}")
        return presence

    @property
    def is_visible(self) -> bool:
        """Whether this process can see by the pid whether it has ended."""
        return bool(self.started) and self.scope == _scope()

    def listens_at(self) -> tuple[str, int] | None:
        """Host and port of its listening socket, as seen from here; None without one."""
        if not self.port:
            return None
        if self.scope.startswith(f"{machine()}/"):  # another container, or user
            return LOOPBACK[1], self.port
        return (self.hosts[0], self.port) if self.hosts else None

    def how_ended(self) -> str | None:
        """The sign that the process has ended, or None. Never waits."""
        error_text = _reported_error(self.error_file)
        if error_text is None and not self.has_ended():
            return None
        return f"its process {self.pid} has ended" + (f": {error_text}" if error_text else "")

    def has_ended(self) -> bool:
        """Whether the process is certainly gone, or a zombie."""
        if not self.is_visible:
            return False
        found = _stat_of(self.pid)
        if found is None:
            return not operating_system.process_exists(self.pid)
        state, started = found
        if started != self.started:
            return True
        return state in "ZX" and _has_no_other_thread(self.pid)


def _stat_of(pid: int) -> tuple[str, str] | None:
    """State and start of a process (proc_pid_stat(5)), or None if it cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def _has_no_other_thread(pid: int) -> bool:
    try:
        return len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return not operating_system.process_exists(pid)


def _scope() -> str:
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"unknown {os.getpid()}"
    return f"{machine()}/{namespace}/{operating_system.user_id()}"


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _reported_error(path: str) -> str | None:
    """The first line of a failed worker's error file from torchrun; None without one."""
    try:
        with open(path, "rb") as file:
            message = json.loads(file.read(MAX_ERROR_BYTES))["message"]
        text = message["message"] if isinstance(message, dict) else message
        return str(text).partition("\n")[0]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or not whole yet
        return None
