"""Targets of processes as bytes, pickled as `multiprocessing` does it for a spawned process.

Queues, locks and connections may be among the arguments. Descriptors do not travel with the bytes:
`multiprocessing.resource_sharer` serves them from this process when the rank unpickles.
"""

from __future__ import annotations

from multiprocessing import context, reduction, resource_sharer
from typing import Any


class _Spawning:
    """Stands for the process being spawned, of which the pickler asks for descriptors."""

    DupFd = staticmethod(resource_sharer.DupFd)

    @staticmethod
    def duplicate_for_child(fd: int) -> int:
        """The descriptor itself: `DupFd` duplicates it."""
        return fd


def dump_target(target: object) -> bytes:
    """The pickled target. Raises any exception of its own reduction."""
    spawning: Any = context
    spawning.set_spawning_popen(_Spawning())
    try:
        return bytes(reduction.ForkingPickler.dumps(target))
    finally:
        spawning.set_spawning_popen(None)
