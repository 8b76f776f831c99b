"""Copied as test_spawned.py: every outcome of a test, in ranks that are new interpreters."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from session_recorder import note

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(2, timeout=60)
FOREVER_S = 600.0


@pytest.mark.fine
def test_passes(
    rank: int,
    world_size: int,
    world: RankWorld,
    from_conftest: str,
    tmp_path: Path,
    checkpoint_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (rank, world_size) == (int(os.environ["RANK"]), 2)
    assert from_conftest == "from conftest.py"
    print("captured")
    assert capsys.readouterr().out == "captured\n"
    assert len(set(world.gather(str(tmp_path)))) == 2
    assert len(set(world.gather(str(checkpoint_dir)))) == 1
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    note("rank", rank=rank, parent=os.getppid())


def test_fails(rank: int) -> None:
    print(f"out of rank {rank}")
    print(f"err of rank {rank}", file=sys.stderr)
    found = {"rank": rank}
    assert found == {"rank": 0}


def test_crashes(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


@pytest.mark.world_size(1, timeout=3)
def test_hangs() -> None:
    print("before the hang", flush=True)
    time.sleep(FOREVER_S)
