"""The phases of one rank's save or load: how long each takes, for the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from pytest_dcp.garbage_collection import collector_paused

logger = logging.getLogger("pytest_dcp.checkpoint")


class Phases:
    """Times of named phases, in the order of their first start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str, *, planning: bool = False) -> Iterator[None]:
        """Add the time spent inside to the phase. While planning, garbage collection is off."""
        start = time.perf_counter()
        try:
            with collector_paused() if planning else nullcontext():
                yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def log(self, verb: str, where: object, nbytes: int, rank: int, more: str = "") -> None:
        """Log at INFO the operation and the time of each phase."""
        if not logger.isEnabledFor(logging.INFO):
            return
        total = time.perf_counter() - self._start
        parts = ", ".join(f"{name} {spent * 1e3:.1f} ms" for name, spent in self.seconds.items())
        logger.info(
            "rank %d: %s %s: %.3f MB in %.1f ms (%s)%s",
            rank, verb, where, nbytes / 1e6, total * 1e3, parts, more,
        )  # fmt: skip
