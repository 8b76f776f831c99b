"""A rank's view of its world: meetings of all ranks that carry Python values.

Meetings go through the controller, not through torch's process group: they work whatever state the
group is in, name the rank that does not come, and end when it cannot come any more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from pytest_dcp.harness.rank import Rank

T = TypeVar("T")


class RankWorld:
    """What the `world` fixture gives. Every method is collective: all ranks must call it."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._rank.order.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._rank.order.size

    @property
    def seed(self) -> int:
        """The seed that every rank was seeded with; not collective."""
        return self._rank.seed

    def barrier(self) -> None:
        """Return when every rank has called it.

        Raises `DivergedError` when a rank ended, or asked the world for something else.
        """
        __tracebackhide__ = True
        self._rank.meet("barrier()")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Values are pickled."""
        __tracebackhide__ = True
        import cloudpickle

        values = self._rank.meet("gather()", cloudpickle.dumps(value))
        return [cloudpickle.loads(data) for data in values]

    def broadcast(self, value: T, src: int = 0) -> T:
        """The value that rank `src` gave; what the others give is ignored. Values are pickled."""
        __tracebackhide__ = True
        import cloudpickle

        if not 0 <= src < self.size:
            raise ValueError(f"src takes a rank from 0 to {self.size - 1}; got {src!r}")
        payload = cloudpickle.dumps(value) if self.rank == src else b""
        sent: T = cloudpickle.loads(self._rank.meet(f"broadcast(src={src})", payload)[src])
        return sent

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others: for downloads and caches.

        When rank 0 raises in it, the others raise `DivergedError`.
        """
        __tracebackhide__ = True
        if self.rank == 0:
            yield
            self._rank.meet("rank0_first()")
        else:
            self._rank.meet("rank0_first()")
            yield
