"""Saves and loads of one rank's view of a fake world: torch's FakeProcessGroup, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import pytest_dcp.checkpoint as dcp
from pytest_dcp import simulate

RANK, SIZE = 5, 16


@pytest.fixture
def fake_world() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=SIZE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(full: torch.Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (4, 4), mesh_dim_names=("dp", "tp"))
    return distribute_tensor(full, mesh, [Replicate(), Shard(0)], src_data_rank=None)


@pytest.mark.usefixtures("fake_world")
def test_a_save_is_planned_for_all_ranks_and_writes_nothing(tmp_path: Path) -> None:
    state = {"w": sharded(torch.zeros(10, 2)), "b": torch.zeros(3), "own": dcp.PerRank(1)}
    folder = tmp_path / "checkpoint"
    metadata = dcp.save(state, checkpoint_id=folder)
    keys = metadata.state_dict_metadata
    assert [chunk.offsets for chunk in keys["w"].chunks] == [(0, 0), (3, 0), (6, 0), (9, 0)]
    assert [name for name in keys if name.startswith("own")] == [
        f"own.rank_{rank}_of_16" for rank in range(16)
    ]
    assert metadata.storage_data is None
    assert not folder.exists()


@pytest.mark.usefixtures("fake_world")
def test_a_plan_that_no_save_takes_is_refused(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (4, 4), mesh_dim_names=("dp", "tp"))
    part = distribute_tensor(torch.zeros(8), mesh["tp"], [Shard(0)], src_data_rank=None)
    with pytest.raises(ValueError, match=r"none has all 16 ranks of the fake world"):
        dcp.save({"w": part}, checkpoint_id=tmp_path)
    whole = sharded(torch.zeros(8))
    metadata = dcp.save({"w": part, "v": whole}, checkpoint_id=tmp_path)
    assert len(metadata.state_dict_metadata["w"].chunks) == 4


@pytest.mark.usefixtures("fake_world")
def test_a_load_reads_the_part_of_the_view(tmp_path: Path) -> None:
    full = torch.arange(20.0).reshape(10, 2)
    saved = {"w": full, "own": {f"rank_{rank}_of_16": rank * 10 for rank in range(SIZE)}}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    state = {"w": sharded(torch.zeros(10, 2)), "own": dcp.PerRank(0)}
    dcp.load(state, checkpoint_id=tmp_path)
    assert torch.equal(state["w"].to_local(), full[3:6])
    assert state["own"].value == 50


@pytest.mark.usefixtures("fake_world")
def test_other_operations_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the other ranks of a fake process group do not exist"):
        dcp.async_save({"w": torch.zeros(2)}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="a HuggingFaceStorageWriter cannot be used in a fake"):
        dcp.save(
            {"w": torch.zeros(2)}, storage_writer=dcp.HuggingFaceStorageWriter(path=str(tmp_path))
        )
    group = dist.new_group([4, 5, 6, 7])
    with pytest.raises(ValueError, match="a save of 4 of the 16 ranks of a fake world cannot"):
        dcp.save({"w": torch.zeros(2)}, checkpoint_id=tmp_path, process_group=group)


@pytest.mark.usefixtures("fake_world")
def test_the_plan_is_that_of_the_mesh_and_placements(tmp_path: Path) -> None:
    state = {"w": sharded(torch.zeros(10, 2)), "b": torch.zeros(3)}
    metadata = dcp.save(state, checkpoint_id=tmp_path)
    by_hand = simulate((4, 4), {"w": [Replicate(), Shard(0)]}, {**state, "w": torch.zeros(10, 2)})
    from_mesh = simulate(init_device_mesh("cpu", (4, 4)), None, state)
    assert by_hand.file_bytes.tolist() == from_mesh.file_bytes.tolist()
    assert by_hand.chunks == sum(
        len(getattr(key, "chunks", [1])) for key in metadata.state_dict_metadata.values()
    )
