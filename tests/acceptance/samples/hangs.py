"""Copied as test_hangs.py: worlds that would never end by themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.world_size(4, timeout=3)
FOREVER_S = 600


@pytest.fixture
def hang_in_setup(rank: int) -> None:
    if rank == 1:
        time.sleep(FOREVER_S)


@pytest.fixture
def hang_in_teardown(rank: int) -> Iterator[None]:
    yield
    if rank == 2:
        time.sleep(FOREVER_S)


def test_collective_that_one_rank_leaves_out(rank: int) -> None:
    if rank != 1:
        dist.all_reduce(torch.ones(1))


def test_mismatched_collectives(rank: int) -> None:
    if rank == 0:
        dist.broadcast(torch.ones(1), 1)
    else:
        dist.all_reduce(torch.ones(1))


def test_busy_loop(rank: int) -> None:
    while rank == 2:
        pass


def test_sleep(rank: int) -> None:
    if rank == 3:
        time.sleep(FOREVER_S)


def test_stopped_process(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


@pytest.mark.usefixtures("hang_in_setup")
def test_setup() -> None:
    pass


@pytest.mark.usefixtures("hang_in_teardown")
def test_teardown() -> None:
    pass
