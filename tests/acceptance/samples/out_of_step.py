"""Copied as test_out_of_step.py: warm tests that leave something open for the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from session_recorder import note

pytestmark = pytest.mark.world_size(3, isolation="module")
open_works: list[Any] = []
"""Keeps the started works alive: the destructor of a work would wait for it."""


@pytest.fixture(scope="module")
def pair() -> Any:
    return dist.new_group([0, 1])


@pytest.fixture
def leaves_a_collective(rank: int) -> Iterator[None]:
    yield
    if rank == 1:
        open_works.append(dist.all_reduce(torch.ones(1), async_op=True))


def test_collective_of_one_rank(rank: int) -> None:
    if rank == 0:
        open_works.append(dist.all_reduce(torch.ones(1), async_op=True))


def test_other_half(rank: int) -> None:
    note("world after a collective", rank=rank, pid=os.getpid())
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 3


def test_collective_in_a_subgroup(rank: int, pair: Any) -> None:
    if rank == 1:
        open_works.append(dist.broadcast(torch.ones(1), 1, group=pair, async_op=True))


def test_collective_at_teardown(leaves_a_collective: None) -> None:
    pass


def test_collectives_of_two_kinds(rank: int) -> None:
    if rank == 0:
        open_works.append(dist.broadcast(torch.ones(1), 0, async_op=True))
    else:
        open_works.append(dist.all_reduce(torch.ones(1), async_op=True))


def test_message_that_is_not_received(rank: int) -> None:
    if rank == 0:
        open_works.append(dist.isend(torch.ones(1), 2))


def test_receive_of_nothing(rank: int) -> None:
    if rank == 2:
        open_works.append(dist.irecv(torch.ones(1)))


@pytest.mark.xfail(reason="known", strict=True)
def test_expected_failure(rank: int) -> None:
    if rank == 0:
        open_works.append(dist.all_reduce(torch.ones(1), async_op=True))


def test_group_of_one_rank(rank: int) -> None:
    if rank == 0:
        dist.distributed_c10d._world.group_count += 1  # as after a group made by one rank alone


def test_in_step(rank: int, pair: Any) -> None:
    note("in step", rank=rank, pid=os.getpid())
    dist.barrier()
    dist.monitored_barrier()
    if rank < 2:
        dist.all_reduce(torch.ones(1), group=pair)
    value = torch.zeros(1)
    if rank == 0:
        dist.send(torch.ones(1), 1)
        dist.send(torch.ones(1), 1)
    elif rank == 1:
        dist.recv(value, 0)
        dist.recv(value)
    gathered: list[Any] = [None] * 3
    dist.all_gather_object(gathered, rank)
    dist.scatter(value, [torch.ones(1)] * 3 if rank == 0 else None)
    works = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(2)]
    works[1].wait()


def test_in_step_after(rank: int) -> None:
    note("in step", rank=rank, pid=os.getpid())


@settings(max_examples=30, database=None, derandomize=True)
@given(x=st.integers(0, 1000))
def test_example(rank: int, x: int) -> None:
    if rank == 0 and x > 100:
        open_works.append(dist.all_reduce(torch.ones(1), async_op=True))


@settings(max_examples=30, database=None, derandomize=True)
@given(x=st.integers(0, 1000))
def test_example_in_step(rank: int, x: int) -> None:
    note("examples in step", rank=rank, pid=os.getpid())
    dist.all_reduce(torch.ones(1), async_op=True)
    if x > 10 and rank < 2:
        value = torch.full((1,), float(rank))
        (dist.send if rank == 0 else dist.recv)(value, 1 - rank)
