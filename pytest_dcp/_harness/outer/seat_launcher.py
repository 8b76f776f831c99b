"""A `Launcher` whose ranks are started by seats: rank `r` of each world by the seat of outer rank
`r`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pytest_dcp._harness.outer.seat_hub import SeatHub
from pytest_dcp._harness.outer.seat_messages import LaunchRank, Preload, SignalAct, SignalRank
from pytest_dcp._harness.protocol.launcher import (
    LauncherLostError,
    OuterPlace,
    ProcessExit,
    RankFds,
    RankLaunch,
    StopChange,
)
from pytest_dcp._harness.protocol.places import PREPARE_S
from pytest_dcp.errors import WorldError


class SeatLauncher:
    """The controller's launcher in a session under an outer launcher."""

    name = "seats"
    lost = ""
    first_place = ""

    def __init__(
        self, hub: SeatHub, *, store_url: str, master_addr: str, end_own_seat: Callable[[], None]
    ) -> None:
        self._hub = hub
        self._store_url = store_url
        self._master_addr = master_addr
        self._end_own_seat = end_own_seat

    def await_ready(self) -> None:
        """Wait until every seat can start ranks."""
        deadline = time.monotonic() + PREPARE_S
        with self._hub.changed:
            while unready := self._hub.unready():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise LauncherLostError(f"seat {unready[0]} was not ready in {PREPARE_S:g} s")
                self._hub.changed.wait(left_s)

    def check_running(self) -> None:
        """Does nothing: the end of a seat is an event."""

    def launch(self, orders: Sequence[RankLaunch], fds: Sequence[RankFds]) -> None:
        """Have one process started by the seat of each rank. Raises `WorldError` without a seat."""
        self.require(len(orders))
        places = self._places(len(orders))
        for order, rank_fds, place in zip(orders, fds, places, strict=True):
            store = f"{self._store_url}/world{order.world}"
            placed = replace(order, store=store, place=place)
            self._hub.open_channel((order.world, order.rank), order.rank, rank_fds)
            self._hub.send([order.rank], LaunchRank(placed.to_json()))

    def require(self, size: int) -> None:
        """Raise `WorldError` if there are fewer seats, or one of them is lost."""
        if size > self._hub.size:
            raise WorldError(
                f"a world of {size} ranks does not fit: the launcher has started {self._hub.size}"
            )
        for rank, lost in sorted(self._hub.lost_seats().items()):
            if rank < size:
                raise WorldError(f"rank {rank}: {lost}")

    def gpu_problem(self, size: int, *, one_each: bool) -> str:
        """Why a world of `size` ranks lacks GPUs; empty if it has them."""
        for rank, place in enumerate(self._places(size)):
            join = self._hub.joins()[rank]
            if join.gpus == 0 or (one_each and place.local_rank >= join.gpus):
                count = f"{join.gpus} GPU{'' if join.gpus == 1 else 's'}"
                return f"rank {rank} needs a GPU, and its node has {count}"
        return ""

    def _places(self, size: int) -> list[OuterPlace]:
        """Each rank's place among the `size` ranks of a world."""
        seats = [self._hub.seat(rank) for rank in range(size)]
        joins = [seat.join for seat in seats if seat.join is not None]
        nodes = [join.node for join in joins]
        distinct = list(dict.fromkeys(nodes))
        shares = all(join.sees_folder for join in joins)
        return [
            OuterPlace(
                local_rank=nodes[:rank].count(nodes[rank]),
                local_size=nodes.count(nodes[rank]),
                node=distinct.index(nodes[rank]),
                master_addr=self._master_addr,
                clock_ahead_s=0.0 if join.machine == joins[0].machine else seat.clock_ahead_s,
                shares_folder=shares,
            )
            for rank, (join, seat) in enumerate(zip(joins, seats, strict=True))
        ]

    def fileno(self) -> int:
        """A descriptor that is readable when there are news."""
        return self._hub.fileno()

    def has_news(self, world: int) -> bool:
        """Whether there are news of this world."""
        return self._hub.has_news(world)

    def news(self, world: int) -> list[ProcessExit | StopChange]:
        """Ends and stops of this world's ranks since the last call."""
        return self._hub.take_news(world)

    def stacks(self, world: int, rank: int) -> None:
        """Have the rank write its stacks; they come with its end."""
        self._signal(world, rank, "stacks")

    def interrupt(self, world: int, rank: int) -> None:
        """Raise KeyboardInterrupt in the rank."""
        self._signal(world, rank, "interrupt")

    def kill(self, world: int, rank: int) -> None:
        """SIGKILL the rank and its process group."""
        self._signal(world, rank, "kill")

    def pause(self, world: int, rank: int) -> None:
        """SIGSTOP the rank and its process group."""
        self._signal(world, rank, "pause")

    def resume(self, world: int, rank: int) -> None:
        """SIGCONT the rank and its process group."""
        self._signal(world, rank, "resume")

    def _signal(self, world: int, rank: int, act: SignalAct) -> None:
        self._hub.send([rank], SignalRank(world, rank, act))

    def at_work(self, world: int, rank: int, pid: int) -> bool:
        """By the seat's last report."""
        return self._hub.activity((world, rank))[0]

    def main_thread_cpu_s(self, world: int, rank: int, pid: int) -> float:
        """By the seat's last report."""
        return self._hub.activity((world, rank))[1]

    def preload(self, modules: Sequence[str]) -> None:
        """Import these in the seats' zygotes."""
        if modules:
            self._hub.send(range(self._hub.size), Preload(tuple(modules)))

    def forget(self, world: int) -> None:
        """The world is gone."""
        self._hub.forget(world)

    def close(self) -> None:
        """End this process's own seat; the others wait for the verdict."""
        self._end_own_seat()
