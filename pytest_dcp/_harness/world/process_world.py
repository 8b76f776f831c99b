"""A world whose ranks are processes that an unmodified test starts, each with an order of its own.

Enters: orders, some ranks each with its own. Leaves: the facts that a `multiprocessing.Process`
gives (process id, whether it has ended, exit code), and the `Outcome` of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pytest_dcp._harness.protocol.messages import Down, Phase
from pytest_dcp._harness.world.world import World


class ProcessWorld(World):
    """A `World` that its test looks at while it runs. Not thread-safe: one thread drives it."""

    def begin_each(self, phase: Phase, orders: Mapping[int, Down]) -> None:
        """Have each rank of `orders` start a phase; `finish` follows."""
        with self._guarded():
            self._loop.drain()
            self._is_awaited = True
            with self._loop.interrupts.held():
                ready = {rank: orders[rank] for rank in self._supervisor.idle if rank in orders}
                self._loop.act(self._supervisor.begin(phase, ready, self._deadline))

    def advance(self, within_s: float) -> bool:
        """Handle what happens within the time; whether every rank has answered or ended."""
        until = time.monotonic() + within_s
        with self._guarded():
            while not self._supervisor.settled:
                left_s = until - time.monotonic()
                self._loop.step(max(0.0, left_s))
                if left_s <= 0:
                    break
            return self._supervisor.settled

    def see_failure_elsewhere(self) -> None:
        """A process of another world of the same test has failed: the ranks get the grace."""
        self._supervisor.see_failure_elsewhere(time.monotonic())

    def await_survivors(self) -> None:
        """Give the peers of a failed rank the whole time limit: the test expects the failure."""
        self._supervisor.await_survivors()

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed, or ended without an answer, in this phase."""
        results = self._supervisor.results.values()
        return bool(self._supervisor.failures) or any(one.outcome == "failed" for one in results)

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has answered, or its process has ended."""
        return rank in self._supervisor.results or rank in self._loop.statuses

    @property
    def port(self) -> int:
        """The port that is reserved for the world."""
        return self._order(0).master_port

    def pid(self, rank: int) -> int:
        """A rank's process id."""
        return self._loop.ranks[rank].pid

    def exit_code(self, rank: int) -> int | None:
        """The exit code of a rank's process, minus a signal, or the code that it has reported.

        None before its end.
        """
        status = self._loop.statuses.get(rank)
        result = self._supervisor.results.get(rank)
        if result is not None and result.returncode is not None:
            return result.returncode
        return status
