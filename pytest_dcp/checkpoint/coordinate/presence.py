"""Which process a rank is, and whether it has ended, as far as this machine can tell.

Each rank leaves its process in the group's store at its first operation, before it has met anybody.
So a rank of this machine that is killed before it meets the coordinator is missed within seconds,
and so is the coordinator. Nothing is concluded of a process of another machine, container or user,
nor of a rank that has not come to its first operation.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pytest_dcp.checkpoint.coordinate.machines import machine


@dataclass(frozen=True, slots=True)
class Presence:
    """One rank's process."""

    pid: int
    started: str
    """When, in clock ticks since boot: another process may get the same pid."""
    scope: str
    """Equal in processes that see each other by these pids: machine, pid namespace and user."""

    @classmethod
    def own(cls) -> Presence:
        """This process."""
        pid = os.getpid()
        _, started = _stat_of(pid) or ("", "")
        return cls(pid, started, _scope())

    def encode(self) -> str:
        """What the store keeps."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Presence:
        """The presence in a store's value."""
        return cls(**json.loads(data))

    def has_ended(self) -> bool:
        """Whether the process is certainly gone, or a zombie."""
        if not self.started or self.scope != _scope():
            return False
        found = _stat_of(self.pid)
        if found is None:
            return not _exists(self.pid)
        state, started = found
        if started != self.started:
            return True
        return state in "ZX" and _has_no_other_thread(self.pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _stat_of(pid: int) -> tuple[str, str] | None:
    """State and start of a process (proc_pid_stat(5)), or None where there is none to be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def _has_no_other_thread(pid: int) -> bool:
    try:
        return len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return not _exists(pid)


def _scope() -> str:
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return f"unknown {os.getpid()}"
    return f"{machine()}/{namespace}/{os.geteuid()}"
