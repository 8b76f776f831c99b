"""The `world` fixture in a rank: exchanges of Python values between all ranks, and process faults.

Exchanges go through the controller, not through torch's process group. So they work even if the
group is broken, and if a rank cannot come any more, they end and name it. They do not wait for
ranks that the test itself killed or stopped.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TypeVar

from pytest_dcp._harness.protocol.messages import FaultAct, FaultAnswer, FaultAsk
from pytest_dcp._harness.rank.call_points import Point
from pytest_dcp._harness.rank.this_rank import Rank
from pytest_dcp.errors import DivergedError, WorldError

T = TypeVar("T")


class RankWorld:
    """The value of the `world` fixture.

    Exchanges are collective: all ranks must call them. Process faults are not: any rank may request
    one, for itself or another rank.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._points: list[Point] = []

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
        """The seed of every rank's random generators. Not collective."""
        return self._rank.seed

    def barrier(self) -> None:
        """Return when every surviving rank has called it.

        Raises `DivergedError` if a rank ended, or called another method instead.
        """
        __tracebackhide__ = True
        self._rank.meet("barrier()")

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Values are pickled.

        None for a rank that the test killed or stopped.
        """
        __tracebackhide__ = True
        import cloudpickle

        values = self._rank.meet("gather()", cloudpickle.dumps(value))
        return [None if data is None else cloudpickle.loads(data) for data in values]  # type: ignore[misc]  # T alone for the tests that lose no rank: nearly all

    def broadcast(self, value: T, src: int = 0) -> T:
        """The value that rank `src` passes; the others' values are ignored. Values are pickled.

        Raises `DivergedError` if the test killed or stopped that rank.
        """
        __tracebackhide__ = True
        import cloudpickle

        self._check("broadcast", "src", src)
        payload = cloudpickle.dumps(value) if self.rank == src else b""
        data = self._rank.meet(f"broadcast(src={src})", payload)[src]
        if data is None:
            raise DivergedError(f"broadcast(src={src}): rank {src} was lost or stopped as asked")
        result: T = cloudpickle.loads(data)
        return result

    @contextlib.contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others: for downloads and caches.

        If rank 0 raises in it, the others raise `DivergedError`.
        """
        __tracebackhide__ = True
        if self.rank == 0:
            yield
            self._rank.meet("rank0_first()")
        else:
            self._rank.meet("rank0_first()")
            yield

    # Process faults.

    @property
    def survivors(self) -> tuple[int, ...]:
        """Ranks that are neither lost nor stopped, ascending. Not collective."""
        return self._ask("look", self.rank)

    def kill(self, rank: int, *, at: str | None = None, nth: int = 1) -> None:
        """SIGKILL a rank and its child processes; returns when it has ended. Not collective.

        With `at`, "package.module:Qualified.name", the rank dies at the `nth` entry of that
        function, in any thread: then every rank makes the call, and it acts in the named one.
        A requested death does not fail the test; if it does not happen, the test fails.
        """
        self._check("kill", "rank", rank)
        if at is None:
            self._ask("kill", rank)
        elif self.rank == rank:
            self._points.append(Point(at, nth, f"world.kill({rank}, at={at!r})", signal.SIGKILL))

    def pause(self, rank: int, *, at: str | None = None, nth: int = 1) -> None:
        """SIGSTOP a rank and its child processes; returns when it has stopped. Not collective.

        `at` and `nth` as in `kill`. A rank that is not resumed is killed when the others have ended
        the phase, or at the time limit.
        """
        self._check("pause", "rank", rank)
        if at is None:
            self._ask("pause", rank)
        elif self.rank == rank:
            self._points.append(Point(at, nth, f"world.pause({rank}, at={at!r})", signal.SIGSTOP))

    def resume(self, rank: int) -> None:
        """SIGCONT a paused rank; returns when it runs again. Not collective."""
        self._check("resume", "rank", rank)
        self._ask("resume", rank)

    def disarm(self) -> list[str]:
        """Disarm the points in the code. Returns the requested events that did not happen."""
        points, self._points = self._points, []
        for point in reversed(points):
            point.disarm()
        return [text for point in points if (text := point.describe_miss())]

    def _ask(self, act: FaultAct, rank: int) -> tuple[int, ...]:
        answer = self._rank.channel.ask(FaultAsk(act, rank), FaultAnswer)
        if answer.error:
            raise WorldError(answer.error)
        return answer.survivors

    def _check(self, call: str, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{call}(): {name} must be from 0 to {self.size - 1}, got {rank!r}")
