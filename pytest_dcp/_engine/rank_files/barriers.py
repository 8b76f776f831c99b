"""Barriers: all ranks have written their files before any rank goes on."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

from pytest_dcp._torch_internals.rank_files import Barrier, BarrierConfig, barriers_of_torch

BARRIER_REGISTRY: dict[str, type] = {}
"""The classes of barriers by their `barrier_type`."""
LOOK_S = 0.02
"""How often a waiting rank looks whether the others are there."""

Kind = TypeVar("Kind", bound=type)


def register_barrier(barrier_class: Kind) -> Kind:
    """Make a class available to `BarrierConfig` under its `barrier_type`; returns the class."""
    name = getattr(barrier_class, "barrier_type", None)
    if name is not None:
        BARRIER_REGISTRY[name] = barrier_class
    return barrier_class


def create_barrier_from_config(barrier_config: BarrierConfig) -> Barrier | None:
    """The barrier that the configuration describes; None if it names none.

    Raises ValueError for a type that is not registered.
    """
    kind = barrier_config.barrier_type
    if kind is None:
        return None
    if kind not in BARRIER_REGISTRY:
        raise ValueError(
            f"Unknown barrier type: {kind}. Available types: {list(BARRIER_REGISTRY)}: register "
            "others with register_barrier"
        )
    barrier: Barrier = BARRIER_REGISTRY[kind](**barrier_config.barrier_args)
    return barrier


@register_barrier
class DistBarrier(Barrier):
    """The barrier of the default process group."""

    barrier_type = "dist_barrier"

    def __init__(self) -> None:
        """Raises AssertionError without a process group."""
        if not dist.is_initialized():
            raise AssertionError(
                "DistBarrier requires an initialized process group: call init_process_group first"
            )

    def execute_barrier(self) -> None:
        """Return when all ranks of the group have called it; the group's timeout applies."""
        dist.barrier()


@register_barrier
class TCPStoreBarrier(Barrier):
    """A barrier over a TCP store of its own, which needs no process group.

    For a background process, which has none. Rank 0 hosts the store.
    """

    barrier_type = "tcp_store"

    def __init__(
        self,
        global_rank: int,
        global_world_size: int,
        barrier_prefix: str,
        timeout_barrier_init_secs: int,
        use_checkpoint_barrier_tcpstore_libuv: bool,
        tcpstore_port: int,
        master_address: str,
        timeout_secs: int,
    ) -> None:
        """Connect to the store, within `timeout_barrier_init_secs`.

        barrier_prefix: distinguishes barriers that use one store.
        timeout_secs: how long a barrier waits for all ranks.
        use_checkpoint_barrier_tcpstore_libuv: whether the store's server uses libuv.
        """
        self._rank = global_rank
        self._size = global_world_size
        self._prefix = barrier_prefix
        self._timeout_s = float(timeout_secs)
        self._rounds: Counter[str] = Counter()
        self._tcp_store = TCPStore(
            master_address,
            int(tcpstore_port),
            world_size=global_world_size,
            is_master=global_rank == 0,
            timeout=timedelta(seconds=timeout_barrier_init_secs),
            use_libuv=bool(use_checkpoint_barrier_tcpstore_libuv),
        )

    def execute_barrier(self) -> None:
        """Return when all ranks have called it as many times as this rank.

        Raises TimeoutError, naming the ranks that have not come.
        """
        name = f"{self._prefix}/{self._rounds[self._prefix]}"
        self._rounds[self._prefix] += 1
        here = [f"{name}/rank{rank}" for rank in range(self._size)]
        self._tcp_store.set(here[self._rank], "here")
        deadline_s = time.monotonic() + self._timeout_s
        while not self._tcp_store.check(here):
            if time.monotonic() > deadline_s:
                missing = [rank for rank in range(self._size) if not self._has(here[rank])]
                raise TimeoutError(
                    f"barrier {name!r}: rank {self._rank} has waited {self._timeout_s:g} s for "
                    f"ranks {missing}"
                )
            time.sleep(LOOK_S)
        self._leave(name)

    def _leave(self, name: str) -> None:
        """Rank 0 hosts the store: it must not go before the others have looked."""
        self._tcp_store.add(f"{name}/gone", 1)
        deadline_s = time.monotonic() + self._timeout_s
        while self._rank == 0 and self._tcp_store.add(f"{name}/gone", 0) < self._size:
            if time.monotonic() > deadline_s:
                return  # All were here: a rank that has died since is none of this barrier's.
            time.sleep(LOOK_S)

    def _has(self, key: str) -> bool:
        found: bool = self._tcp_store.check([key])
        return found


barriers_of_torch.DistBarrier.register(DistBarrier)
barriers_of_torch.TCPStoreBarrier.register(TCPStoreBarrier)

__all__: list[Any] = [
    "BARRIER_REGISTRY",
    "DistBarrier",
    "TCPStoreBarrier",
    "create_barrier_from_config",
    "register_barrier",
]
