"""Where process groups meet: torch's `env://` and `tcp://` make their store in one function."""

from __future__ import annotations

import importlib
import ipaddress
from typing import Any

from pytest_dcp._torch_internals.supported_versions import TORCH

torch_rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
"""The module: its package has a function of the same name."""
TORCH.require_attributes(torch_rendezvous, "_create_c10d_store", "_torchelastic_use_agent_store")

_replaced: dict[int, int] = {}
"""The port that this process's first group named -> the one where it meets."""


def meet_at(port: int) -> None:
    """Let groups of this process that meet at a port of this machine meet at `port` instead.

    Tests have a fixed port in their text, or choose one that is free at that moment: two sessions,
    or two workers of xdist, would meet each other there. Only the first port is replaced: a test
    with a second one has two groups at a time. For the life of the process. Can go when torch has a
    public hook where a store is made.
    """
    create = torch_rendezvous._create_c10d_store
    if create.__module__ == __name__:
        return  # an earlier process of this rank has done it

    def create_store(hostname: str, named_port: int, *args: Any, **kwargs: Any) -> Any:
        if _is_local(hostname) and not torch_rendezvous._torchelastic_use_agent_store():
            if not _replaced and named_port != 0:
                _replaced[named_port] = port
            named_port = _replaced.get(named_port, named_port)
        return create(hostname, named_port, *args, **kwargs)

    torch_rendezvous._create_c10d_store = create_store


def _is_local(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"
