"""Copied as test_covers.py: runs all of measured.py but one function, mostly in ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import measured
import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds


def test_ordinary() -> None:
    measured.in_the_controller()


@pytest.fixture
def setup_and_teardown() -> Iterator[None]:
    yield
    measured.in_a_fixture()


@pytest.mark.world_size(2)
@pytest.mark.usefixtures("setup_and_teardown")
def test_marked(rank: int) -> None:
    measured.in_every_rank()
    measured.in_one_rank(rank)


@pytest.mark.world_size(2)
def test_fails() -> None:
    measured.in_a_failing_rank()
    raise ValueError("boom")


@pytest.mark.world_size(2)
def test_fails_while_a_peer_waits(rank: int) -> None:
    if rank == 0:
        measured.in_a_rank_with_waiting_peers()
        raise ValueError("boom")
    dist.all_reduce(torch.ones(1))


@pytest.mark.world_size(2, isolation="module")
@pytest.mark.parametrize("time", ["first", "second"])
def test_warm(time: str) -> None:
    if time == "second":
        measured.in_a_warm_world()


def test_function_world(worlds: Worlds) -> None:
    with worlds(2) as world:
        world.run(measured.in_a_function_world)


def failing() -> None:
    measured.in_a_failing_function()
    raise ValueError("boom")


def test_failing_function_world(worlds: Worlds) -> None:
    with worlds(2) as world:
        world.run(failing)
