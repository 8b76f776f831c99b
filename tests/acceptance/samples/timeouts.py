"""Copied as test_timeouts.py: pytest-timeout's limits on worlds; --timeout=1.5 --dcp-timeout=2."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds


@pytest.mark.world_size(2)
@pytest.mark.timeout(0.5)
def test_marker(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(600)


@pytest.mark.world_size(2)
@pytest.mark.timeout(0.5, method="thread")
def test_marker_with_method_thread() -> None:
    time.sleep(600)


@pytest.mark.world_size(2)
def test_option(rank: int) -> None:
    if rank == 0:
        time.sleep(600)


@pytest.fixture
def slow() -> None:
    time.sleep(1)


@pytest.mark.world_size(2)
@pytest.mark.timeout(2, func_only=True)
@pytest.mark.usefixtures("slow")
def test_func_only() -> None:
    time.sleep(1.3)


@pytest.mark.world_size(2)
@pytest.mark.timeout(0.5, func_only=True)
def test_func_only_that_hangs(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.world_size(2)
@pytest.mark.timeout(300)
def test_longer_than_the_default() -> None:
    time.sleep(2.2)


@pytest.mark.world_size(2, timeout=0.5)
@pytest.mark.timeout(300)
def test_own_limit_is_lower() -> None:
    time.sleep(600)


@pytest.mark.world_size(2, timeout=300)
@pytest.mark.timeout(0.5)
def test_plugins_limit_is_lower() -> None:
    time.sleep(600)


@pytest.mark.timeout(0.5)
def test_ordinary() -> None:
    time.sleep(600)


@pytest.mark.timeout(0.5)
def test_function_world(worlds: Worlds) -> None:
    with worlds(2) as world:
        world.run(time.sleep, 600)


@pytest.mark.world_size(2)
def test_after() -> None:
    pass
