"""The controller's launcher: which seat gets which rank, and what the rank knows of its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from pytest_dcp._harness.outer.seat_launcher import SeatLauncher
from pytest_dcp._harness.outer.seat_messages import LaunchRank, SeatJoin, SeatMessage, SignalRank
from pytest_dcp._harness.protocol.launcher import OuterPlace, RankFds, RankLaunch
from pytest_dcp.errors import WorldError

FDS = RankFds(0, 1, 2, 3, 4)


class OneSeat(NamedTuple):
    join: SeatJoin
    clock_ahead_s: float


class NotingHub:
    """Four seats on two nodes, three machines; notes what is sent."""

    size = 4

    def __init__(self) -> None:
        self.sent: list[tuple[list[int], SeatMessage]] = []
        self.channels: list[tuple[tuple[int, int], int]] = []
        self.lost: dict[int, str] = {}
        places = [("a", "m0"), ("a", "m0"), ("b", "m1"), ("b", "m2")]
        self.seats = [
            OneSeat(SeatJoin("t", rank, node, machine, f"p{rank}", gpus=rank), 100.0 * rank)
            for rank, (node, machine) in enumerate(places)
        ]

    def seat(self, rank: int) -> OneSeat:
        return self.seats[rank]

    def joins(self) -> dict[int, SeatJoin]:
        return {rank: seat.join for rank, seat in enumerate(self.seats)}

    def lost_seats(self) -> dict[int, str]:
        return self.lost

    def open_channel(self, key: tuple[int, int], seat: int, fds: RankFds) -> None:
        self.channels.append((key, seat))

    def send(self, ranks: Iterable[int], message: SeatMessage) -> None:
        self.sent.append((list(ranks), message))


def order(rank: int, size: int) -> RankLaunch:
    return RankLaunch(
        session="s", world=7, rank=rank, size=size, backend="gloo", device="cpu", mesh=(size,),
        mesh_dim_names=None, store="/a/file", master_port=1, seed=0, isolation="test",
        basetemp="/b",
    )  # fmt: skip


def launcher_of(hub: Any) -> SeatLauncher:
    return SeatLauncher(
        hub, store_url="tcp://h:1/p", master_addr="10.0.0.1", end_own_seat=contextlib.nullcontext
    )


def launch(hub: NotingHub, size: int) -> list[RankLaunch]:
    orders = [order(rank, size) for rank in range(size)]
    launcher_of(hub).launch(orders, [FDS] * size)
    return [
        RankLaunch.from_json(message.order)
        for _, message in hub.sent
        if isinstance(message, LaunchRank)
    ]


def test_each_rank_goes_to_the_seat_of_its_number() -> None:
    hub = NotingHub()
    launch(hub, 3)
    assert [ranks for ranks, _ in hub.sent] == [[0], [1], [2]]
    assert hub.channels == [((7, 0), 0), ((7, 1), 1), ((7, 2), 2)]


def test_ranks_know_their_place_on_their_node() -> None:
    launched = launch(NotingHub(), 4)
    assert [one.place for one in launched] == [
        OuterPlace(0, 2, 0, "10.0.0.1"),
        OuterPlace(1, 2, 0, "10.0.0.1"),
        OuterPlace(0, 2, 1, "10.0.0.1", clock_ahead_s=200.0),
        OuterPlace(1, 2, 1, "10.0.0.1", clock_ahead_s=300.0),
    ]
    assert {one.store for one in launched} == {"tcp://h:1/p/world7"}


def test_a_smaller_world_counts_only_its_own_ranks() -> None:
    places = [one.place for one in launch(NotingHub(), 3)]
    assert places[2] == OuterPlace(0, 1, 1, "10.0.0.1", clock_ahead_s=200.0)


def test_one_seat_that_does_not_see_the_folder_decides_for_all() -> None:
    hub = NotingHub()
    hub.seats[1] = OneSeat(replace(hub.seats[1].join, sees_folder=False), 0.0)
    assert [one.place and one.place.shares_folder for one in launch(hub, 2)] == [False, False]
    hub.sent.clear()
    assert [one.place and one.place.shares_folder for one in launch(hub, 1)] == [True]


def test_a_world_that_is_too_large_or_lacks_a_seat_is_refused() -> None:
    hub = NotingHub()
    with pytest.raises(WorldError, match=r"a world of 5 ranks does not fit: .* has started 4"):
        launch(hub, 5)
    hub.lost[2] = "its process is gone"
    with pytest.raises(WorldError, match="rank 2: its process is gone"):
        launch(hub, 3)
    launch(hub, 2)


def test_missing_gpus_are_named() -> None:
    launcher = launcher_of(NotingHub())
    assert launcher.gpu_problem(2, one_each=False) == "rank 0 needs a GPU, and its node has 0 GPUs"


def test_signals_go_to_the_ranks_seat() -> None:
    hub = NotingHub()
    launcher_of(hub).kill(7, 2)
    assert hub.sent == [([2], SignalRank(7, 2, "kill"))]
