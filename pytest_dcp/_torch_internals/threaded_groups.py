"""torch's process groups of threads: every thread is a rank, and collectives copy between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Replace torch's registry of groups by one for each thread, and back. Can go when torch has a
    # public backend of threads.
    from torch.testing._internal.distributed import multi_threaded_pg

_threads: Any = multi_threaded_pg
TORCH.require_attributes(torch._C._distributed_c10d, "_set_thread_isolation_mode")
TORCH.require_attributes(
    multi_threaded_pg, "_install_threaded_pg", "_uninstall_threaded_pg", "ProcessLocalGroup"
)
TORCH.require_attributes(_threads.ProcessLocalGroup, "exception_handle", "reset")

__all__ = ["end_collectives", "groups_of_threads", "join_threads_group"]


@contextlib.contextmanager
def groups_of_threads() -> Iterator[dist.Store]:  # type: ignore[name-defined]  # public, not in __all__
    """Inside, each thread has process groups of its own; gives the store at which they meet."""
    # Without it a functional collective finds the groups of another thread.
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    _threads._install_threaded_pg()
    try:
        yield dist.HashStore()  # type: ignore[attr-defined]  # public, not in __all__
    finally:
        _threads.ProcessLocalGroup.reset()
        _threads._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]


def join_threads_group(store: dist.Store, rank: int, size: int) -> None:  # type: ignore[name-defined]
    """Make the calling thread a rank."""
    dist.init_process_group("threaded", store=store, rank=rank, world_size=size)


def end_collectives(error: BaseException) -> None:
    """Have the ranks that wait in a collective end by SystemExit: one of them has failed."""
    _threads.ProcessLocalGroup.exception_handle(error)
