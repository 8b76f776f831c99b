"""Copied as test_wide_fixtures.py: fixtures of wide scopes that use those of the world."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist
from session_recorder import note

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size([1, 2], isolation="module")
Facts = tuple[int, int, int, str, int, list[int]]


@pytest.fixture(scope="session")
def facts(
    rank: int,
    local_rank: int,
    world_size: int,
    device: torch.device,
    device_mesh: DeviceMesh,
    world: RankWorld,
) -> Facts:
    note("set up", scope="session", rank=rank, size=world_size)
    return rank, local_rank, world_size, str(device), device_mesh.size(), world.gather(rank)


@pytest.fixture(scope="module")
def of_module(request: pytest.FixtureRequest, facts: Facts, rank: int) -> Facts:
    note("set up", scope="module", rank=rank, size=request.getfixturevalue("world_size"))
    return facts


@pytest.fixture(scope="class")
def of_class(of_module: Facts, world_size: int) -> Facts:
    assert of_module[2] == world_size
    return of_module


def test_list(of_class: Facts) -> None:
    size = dist.get_world_size()
    assert of_class == (dist.get_rank(), dist.get_rank(), size, "cpu", size, [*range(size)])


def test_list_again(of_class: Facts) -> None:
    test_list(of_class)


@pytest.mark.world_size(isolation="module")
@pytest.mark.parametrize(("world_size", "other"), [(2, "x")])
def test_own_parametrization(of_class: Facts, other: str) -> None:
    test_list(of_class)


@pytest.mark.world_size(2)
def test_kill_at_is_judged_at_the_end_of_its_test(world: RankWorld) -> None:
    world.kill(1, at="json:load")
