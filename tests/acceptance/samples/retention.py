"""Copied as test_retention.py: files that tests leave in the folders pytest gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
from session_recorder import note

from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(2)


@pytest.mark.parametrize("verdict", ["passes", "fails"])
def test_leaves(
    verdict: str, checkpoint_dir: Path, tmp_path: Path, rank: int, world: RankWorld
) -> None:
    empty = not any(checkpoint_dir.iterdir())
    world.barrier()
    (checkpoint_dir / f"of rank {rank}").touch()
    for fixture, path in (("checkpoint_dir", checkpoint_dir), ("tmp_path", tmp_path)):
        note("folder", verdict=verdict, fixture=fixture, path=str(path), empty=empty, rank=rank)
    assert verdict == "passes"
