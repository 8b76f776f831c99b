"""Copied as test_reruns.py: tests that pass in the end, each rank counting its tries in a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from session_recorder import note

from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(2)


@pytest.fixture
def tries(request: pytest.FixtureRequest, rank: int, checkpoint_dir: Path) -> int:
    """How often this rank has tried this test, this time included."""
    name = request.node.name
    file = Path(f"{name}-{rank}.tries")
    count = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(count))
    note(name, count=count, rank=rank, folder=str(checkpoint_dir))
    return count


def test_passes_the_third_time(
    tries: int, rank: int, checkpoint_dir: Path, world: RankWorld
) -> None:
    assert list(checkpoint_dir.iterdir()) == []
    world.barrier()
    (checkpoint_dir / f"of rank {rank}").touch()
    if rank == 1:
        assert tries == 3
    dist.all_reduce(torch.ones(1))


def test_dies_the_first_time(tries: int) -> None:
    if tries == 1:
        os._exit(3)


@pytest.fixture
def broken_once(tries: int) -> None:
    assert tries == 2


@pytest.mark.usefixtures("broken_once")
def test_fails_in_setup_the_first_time() -> None:
    pass


@pytest.mark.flaky(reruns=1)
def test_is_marked_flaky(tries: int) -> None:
    assert tries == 2


def test_raises_a_value_error(tries: int) -> None:
    raise ValueError(f"the {tries}. time")


def test_never_passes(tries: int) -> None:
    assert tries == 0
