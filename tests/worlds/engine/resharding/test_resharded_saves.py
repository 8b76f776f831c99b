"""A resharded checkpoint has the parts and files that real ranks of the mesh save."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.resharding.placement_texts import PlacementRules
from pytest_dcp._engine.resharding.reshard import reshard
from support.states import numbered, spread

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
LAYOUTS: dict[str, tuple[tuple[int, ...], list[str], dict[str, tuple[Placement, ...]]]] = {
    "FSDP": ((4,), ["S0"], {"w": (Shard(0),), "v": (Shard(0),), "short": (Shard(0),)}),
    "HSDP": (
        (2, 2),
        ["R,S0", "v=R,S1"],
        {
            "w": (Replicate(), Shard(0)),
            "v": (Replicate(), Shard(1)),
            "short": (Replicate(), Shard(0)),
        },
    ),
    "2D": (
        (2, 2),
        ["S0,S1"],
        {"w": (Shard(0), Shard(1)), "v": (Shard(0), Shard(1)), "short": (Shard(0), Replicate())},
    ),
}


def full_state() -> dict[str, Any]:
    return {
        "model": {"w": numbered(10, 6), "v": numbered(7, 5, 2), "short": numbered(3)},
        "scalar": torch.tensor(5.0),
        "lists": [1, {"rate": 0.5}],
        "table": {3: torch.ones(4, 2)},
    }


def describe(folder: Path) -> dict[str, Any]:
    """Every name's parts, and every file's length, without the ids of saves."""
    with dcp.open(folder) as checkpoint:
        parts: dict[str, Any] = {
            name: [
                (shard.offset, shard.shape, re.sub("-.*", "", shard.file or ""))
                for shard in lazy.shards
            ]
            for name, lazy in checkpoint.items()
            if hasattr(lazy, "shards")
        }
        names = sorted(checkpoint)
    sizes = {re.sub("-.*", "", p.name): p.stat().st_size for p in folder.glob("*.distcp")}
    return {"names": names, "parts": parts, "sizes": sizes}


@pytest.mark.world_size(4)
def test_parts_and_files_are_those_of_real_ranks(checkpoint_dir: Path, rank: int) -> None:
    whole = checkpoint_dir / "whole"
    if rank == 0:
        dcp.save(full_state(), checkpoint_id=whole, no_dist=True)
    for name, (shape, texts, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", shape)
        state = full_state()
        for key, row in placements.items():
            state["model"][key] = spread(state["model"][key], mesh, *row)
        table = [Replicate()] * len(shape)
        table[-1 if name == "HSDP" else 0] = Shard(0)
        if name == "2D":
            table[1] = Shard(1)
        state["table"][3] = spread(state["table"][3], mesh, *table)
        dcp.save(state, checkpoint_id=checkpoint_dir / name)
        if rank == 0:
            made = checkpoint_dir / f"{name}-made"
            rules = PlacementRules.parse(texts_for(texts), len(shape))
            report = reshard(whole, made, shape, rules)
            expected, found = describe(checkpoint_dir / name), describe(made)
            assert found["names"] == expected["names"], name
            assert found["parts"] == expected["parts"], name
            assert found["sizes"] == expected["sizes"], name
            assert report.chunks == sum(map(len, expected["parts"].values()))
        read = {
            "model": {key: torch.zeros_like(value) for key, value in state["model"].items()},
            "scalar": torch.zeros(()),
            "lists": [0, {"rate": 0.0}],
            "table": {3: torch.zeros_like(state["table"][3])},
        }
        torch.distributed.barrier()
        dcp.load(read, checkpoint_id=checkpoint_dir / f"{name}-made")
        assert read["lists"] == [1, {"rate": 0.5}]
        for key, value in [*state["model"].items(), ("table", state["table"][3])]:
            mine = read["table"][3] if key == "table" else read["model"][key]
            assert isinstance(mine, DTensor)
            assert torch.equal(mine.to_local(), value.to_local())


def texts_for(texts: list[str]) -> list[str]:
    """The rules with the full name of `v`."""
    return [text.replace("v=", "model.v=") for text in texts]
