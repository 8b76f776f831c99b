"""This machine: its name among machines, its addresses, and whether all ranks are on it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def local_only(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's variables say that all ranks are on this machine."""
    if environ.get("MASTER_ADDR") in LOOPBACK:
        return True
    size = environ.get("WORLD_SIZE")
    return size is not None and size == environ.get("LOCAL_WORLD_SIZE")


def machine() -> str:
    """Equal in processes that share a kernel and its network, and so a loopback.

    Copies of one virtual machine may have the same value without sharing a loopback.
    """
    try:
        return f"{_boot_id()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def hosts_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """This machine's addresses, best first: the one that routes to the master, then the name."""
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
