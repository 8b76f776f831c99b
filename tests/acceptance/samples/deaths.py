"""Copied as test_deaths.py: ends of ranks that the test asks for, and what is made of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from session_recorder import note

from pytest_dcp import announce_death
from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(3, timeout=30)
FOREVER_S = 600


def step(value: int) -> int:
    return value + 1


class Engine:
    def __init__(self) -> None:
        self.saved = 0

    def save(self, *, twice: bool = False) -> int:
        self.saved += 2 if twice else 1
        return self.saved


@pytest.fixture
def torn_down(request: pytest.FixtureRequest, rank: int) -> Iterator[None]:
    """Notes each rank that is torn down."""
    yield
    note("torn down", test=request.node.name, rank=rank)


# As asked: these pass.


@pytest.mark.usefixtures("torn_down")
def test_killed_by_another(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.kill(2)
    if rank == 2:
        time.sleep(FOREVER_S)
    world.barrier()
    assert world.survivors == (0, 1)
    assert world.gather(rank * 10) == [0, 10, None]


@pytest.mark.world_size(2, timeout=30)
def test_killed_in_a_collective(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.kill(1)
    with pytest.raises(RuntimeError, match=r"(closed|reset) by peer"):
        dist.all_reduce(torch.ones(1))


def test_killed_by_itself(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.kill(0)
    world.barrier()
    assert world.broadcast("from 1" if rank == 1 else "", src=1) == "from 1"


def test_killed_by_all(world: RankWorld, rank: int) -> None:
    world.kill(1)
    assert world.survivors == (0, 2)


def test_killed_at_a_function(world: RankWorld, rank: int) -> None:
    world.kill(1, at=f"{__name__}:step", nth=3)
    assert [step(value) for value in (1, 2)] == [2, 3]
    assert step(3) == 4
    assert rank != 1


def test_killed_at_a_method_in_a_thread(world: RankWorld, rank: int) -> None:
    world.kill(2, at=f"{__name__}:Engine.save")
    engine = Engine()
    thread = threading.Thread(target=engine.save, kwargs={"twice": True})
    thread.start()
    thread.join()
    assert engine.saved == 2
    assert rank != 2


def test_killed_at_a_builtin(world: RankWorld, rank: int) -> None:
    world.kill(0, at="os:getpgrp")
    os.getpgrp()
    assert rank != 0


def test_paused_to_the_end(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.pause(2)
        assert world.survivors == (0, 1)
    if rank == 2:
        time.sleep(FOREVER_S)
    world.barrier()
    assert world.gather(rank) == [0, 1, None]


def test_paused_and_resumed(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.pause(1)
        world.resume(1)
        assert world.survivors == (0, 1, 2)
    world.barrier()
    assert world.gather(rank) == [0, 1, 2]


def test_paused_at_a_function(world: RankWorld, rank: int) -> None:
    world.pause(1, at=f"{__name__}:step")
    world.barrier()
    if rank == 0:
        while 1 in world.survivors:
            time.sleep(0.005)
        world.resume(1)
    assert step(1) == 2


@pytest.mark.parametrize("how", ["kill", "stop", "exit"])
def test_announced(world: RankWorld, rank: int, how: str) -> None:
    if rank == 1:
        threading.Thread(target=end, args=(how,)).start()
    world.barrier() if rank != 1 else time.sleep(FOREVER_S)
    assert rank != 1


def end(how: str) -> None:
    announce_death("Fault() on write_data")
    if how == "kill":
        signal.raise_signal(signal.SIGKILL)
    elif how == "stop":
        signal.raise_signal(signal.SIGSTOP)
    else:
        os._exit(0)


def test_lost_with_a_child(world: RankWorld, rank: int) -> None:
    if rank == 1 and os.fork() == 0:
        time.sleep(FOREVER_S)
    world.kill(1)


@pytest.mark.world_size(3, isolation="module")
class TestWarm:
    def test_loses_a_rank(self, world: RankWorld, rank: int) -> None:
        world.kill(2)

    def test_has_all_ranks_again(self, world: RankWorld, rank: int) -> None:
        assert world.gather(rank) == [0, 1, 2]


# Not as asked: these fail.


def test_a_survivor_fails(world: RankWorld, rank: int) -> None:
    world.kill(2)
    world.barrier()
    assert rank == 0, "as it should not"


def test_announces_and_lives(rank: int) -> None:
    if rank == 1:
        announce_death("Fault() on write_data")
        time.sleep(FOREVER_S)


def test_announces_and_passes(rank: int) -> None:
    if rank == 1:
        announce_death("Fault() on write_data")


def test_another_dies_unasked(world: RankWorld, rank: int) -> None:
    world.kill(2)
    if rank == 1:
        os._exit(0)


def test_all_are_killed(world: RankWorld, rank: int) -> None:
    world.kill(rank)


def test_fails_and_is_killed(world: RankWorld, rank: int) -> None:
    if rank == 1:
        raise ValueError("boom")
    time.sleep(0.2)
    if rank == 0:
        world.kill(1)


def test_never_reached(world: RankWorld, rank: int) -> None:
    world.kill(1, at=f"{__name__}:step", nth=2)
    step(1)


@pytest.mark.world_size(3, timeout=2)
def test_paused_while_others_hang(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.pause(2)
        time.sleep(FOREVER_S)
    elif rank == 2:
        time.sleep(FOREVER_S)


@pytest.mark.parametrize("at", ["no colon", f"{__name__}:setp", f"{__name__}:FOREVER_S"])
def test_no_such_point(world: RankWorld, at: str) -> None:
    world.kill(0, at=at)


def test_kill_of_no_rank(world: RankWorld) -> None:
    world.kill(3)
