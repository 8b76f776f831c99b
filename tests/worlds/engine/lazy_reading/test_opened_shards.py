"""Checkpoints that several ranks saved in parts, opened and converted by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.texts import draw_layout
from pytest_dcp.checkpoint import convert
from support.states import numbered, spread, torch_dcp

SHAPES = {"rows": (7, 6), "columns": (5, 9), "cube": (3, 4, 5)}
SHARDS = {"rows": Shard(0), "columns": Shard(1), "cube": Shard(1)}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("engine", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_parts_that_cross_shards_are_read_and_converted(
    checkpoint_dir: Path, rank: int, world: Any, device_mesh: DeviceMesh, engine: Any
) -> None:
    full = {name: numbered(*shape) for name, shape in SHAPES.items()}
    state = {name: spread(full[name], device_mesh, shard) for name, shard in SHARDS.items()}
    folder = checkpoint_dir / "step"
    engine.save(state, checkpoint_id=folder)
    if rank == 0:
        with dcp.open(folder) as opened:
            check_parts(opened, full)
            convert.to_safetensors(opened, checkpoint_dir / "all.safetensors", budget_bytes=40)
            convert.to_dcp(opened, checkpoint_dir / "one", dtype=torch.float64)
        loaded = load_file(checkpoint_dir / "all.safetensors")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in full.items())
        with dcp.open(checkpoint_dir / "one") as again:
            assert len(again.files) == 1
            for name, tensor in again.read(again).items():
                assert torch.equal(tensor, full[name].double())
    world.barrier()


def check_parts(opened: dcp.OpenCheckpoint, full: dict[str, torch.Tensor]) -> None:
    for name, tensor in full.items():
        lazy = opened[name]
        assert isinstance(lazy, dcp.LazyTensor)
        assert len(lazy.shards) == len({shard.file for shard in lazy.shards}) == 2
        assert sum(shard.nbytes for shard in lazy.shards) == lazy.nbytes
        assert torch.equal(lazy.tensor(), tensor)
        for index in ((slice(2, 5), slice(2, 6)), (slice(None), 3), (..., slice(0, 6, 2)), -1):
            assert torch.equal(lazy[index], tensor[index]), (name, index)
    columns = opened["columns"]
    assert isinstance(columns, dcp.LazyTensor)
    assert draw_layout(columns.shape, columns.shards).plain.splitlines() == ["AAAAABBBB"] * 5
    assert columns._repr_html_().count("<rect") == 2
