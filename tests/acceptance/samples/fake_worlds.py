"""Views of worlds that do not exist."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp


@pytest.mark.world_size(1024, backend="fake")
def test_rank_0_is_the_view_by_default(rank, world_size, local_rank, device):
    assert (rank, world_size, local_rank, device.type) == (0, 1024, 0, "cpu")
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1024, "fake")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1024")


@pytest.mark.world_size(1024, backend="fake", ranks=[0, 513], mesh=(128, 8))
def test_each_view_holds_its_part(rank, device_mesh, checkpoint_dir):
    assert dist.get_rank() == rank
    assert tuple(device_mesh.get_coordinate()) == (rank // 8, rank % 8)
    full = torch.arange(2048.0).reshape(1024, 2)
    part = distribute_tensor(full, device_mesh, [Shard(0), Replicate()], src_data_rank=None)
    assert part.to_local().shape == (8, 2)
    assert part.to_local()[0, 0] == 16 * (rank // 8)
    metadata = dcp.save({"w": part, "own": dcp.PerRank(rank)}, checkpoint_id=checkpoint_dir)
    assert len(metadata.state_dict_metadata["w"].chunks) == 128
    assert len(metadata.state_dict_metadata) == 1025
    assert not list(checkpoint_dir.iterdir())


@pytest.mark.world_size([16, 131072], backend="fake", ranks=(3,))
def test_sizes_and_views_multiply(world_size, rank):
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert (dist.get_world_size(), dist.get_rank()) == (world_size, rank)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.world_size(4, backend="fake")
def test_a_parametrization_chooses_views(rank):
    assert dist.get_rank() == rank


@pytest.mark.world_size(4, backend="fake", ranks=[2])
def test_the_world_fixture_has_no_peers(world):
    pass


@pytest.mark.world_size(4, backend="fake", ranks=[2])
def test_a_failure_names_the_view():
    assert dist.get_rank() == 0


def test_real_ranks_only(worlds):
    with worlds(4, backend="fake"):
        pass
