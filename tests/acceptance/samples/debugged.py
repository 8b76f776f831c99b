"""Copied as test_debugged.py: tests to be stepped through at a terminal."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from session_recorder import note

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds
    from pytest_dcp._harness.rank.world_fixture import RankWorld

LIMIT_S = 2.0
FOREVER_S = 600.0


@pytest.mark.world_size(3, timeout=LIMIT_S)
def test_breakpoint(rank: int, world: RankWorld) -> None:
    note("before", rank=rank, pid=os.getpid())
    breakpoint()
    note("behind", rank=rank)
    world.barrier()
    note("after", rank=rank, pid=os.getpid(), group=os.getpgrp())
    print(f"rank {rank} is done")


@pytest.mark.world_size(2)
def test_fails(rank: int) -> None:
    value = 200 + rank
    assert value == 200


@pytest.mark.world_size(2)
@pytest.mark.xfail(strict=True)
def test_xfails(rank: int) -> None:
    assert rank == 0


@pytest.mark.world_size(2)
def test_stops_and_fails(rank: int) -> None:
    value = 300 + rank
    if rank == 1:
        breakpoint()
    assert value == 300


@pytest.mark.world_size(2)
def test_stops_and_hangs(rank: int) -> None:
    if rank == 1:
        breakpoint()
    note("hangs", rank=rank)
    time.sleep(FOREVER_S)


def stop(value: int) -> int:
    breakpoint()
    return value + int(os.environ["RANK"])


def test_function(worlds: Worlds) -> None:
    with worlds(2) as two:
        assert two.run(stop, 400) == [400, 401]


@pytest.mark.world_size(2)
def test_passes() -> None:
    pass


def test_ordinary() -> None:
    pass
