"""Copied as test_selection.py: a small suite for the options of the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.world_size(2, timeout=30)


@pytest.fixture
def shown() -> Iterator[None]:
    yield
    print("torn down")


@pytest.mark.usefixtures("shown")
def test_passes() -> None:
    pass


@pytest.mark.world_size([1, 2])
def test_of_sizes(world_size: int) -> None:
    assert dist.get_world_size() == world_size


@pytest.mark.world_size(3)
def test_fails_first(rank: int, checkpoint_dir: Path) -> None:
    """Rank 1 fails, then rank 2 in another way; every rank prints."""
    print("printed by", rank)
    flag = checkpoint_dir / "rank 1 failed"
    if rank == 1:
        flag.touch()
        raise ValueError("the cause")
    if rank == 2:
        while not flag.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        raise KeyError("later")


@pytest.mark.parametrize("name", ["it's $HOME [x] & y"])
def test_fails_second(name: str, world_size: int) -> None:
    print("seed", torch.initial_seed())
    assert not name, f"in a world of {world_size}"


def test_fails_third(rank: int) -> None:
    assert rank != 0
