"""Worlds: a marked test runs in fresh processes, one per rank, with its fixtures in every one.

The default process group is up when the test starts. The test fails when any rank fails, and passes
only when every rank says that it passed.
"""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor


@pytest.mark.world_size(2)
def test_all_reduce_sums_over_the_ranks(rank, device):
    total = torch.full((3,), rank + 1.0, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.world_size([1, 2, 4])
def test_a_list_of_sizes_makes_a_test_of_each(rank, world_size):
    count = torch.ones(())
    dist.all_reduce(count)
    assert count.item() == world_size
    assert rank == dist.get_rank()


@pytest.mark.world_size(4)
def test_gather_and_broadcast_carry_any_value(world, rank):
    assert world.gather(f"rank {rank}") == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert world.broadcast({"from": rank}, src=2) == {"from": 2}


@pytest.mark.world_size(2)
def test_ranks_draw_the_same_random_numbers(world):
    first, second = world.gather(torch.rand(8).tolist())
    assert first == second


@pytest.mark.world_size(4)
def test_rank_0_goes_first_where_ranks_would_race(world, rank, checkpoint_dir):
    vocabulary = checkpoint_dir / "vocabulary"
    with world.rank0_first():
        if not vocabulary.exists():
            vocabulary.write_text(f"written by rank {rank}")
    assert vocabulary.read_text() == "written by rank 0"


@pytest.mark.world_size(4, mesh=(2, 2), mesh_dim_names=("dp", "tp"))
class TestMesh:
    """A mark on a class or a module applies to every test in it."""

    def test_all_reduce_stays_within_one_dimension(self, rank, device_mesh):
        total = torch.tensor(rank)
        dist.all_reduce(total, group=device_mesh.get_group("tp"))
        assert total.item() == (0 + 1 if rank < 2 else 2 + 3)

    def test_dtensor_is_cut_along_both_dimensions(self, device_mesh):
        table = torch.arange(16).reshape(4, 4)
        tile = distribute_tensor(table, device_mesh, [Shard(0), Shard(1)])

        row, column = (2 * index for index in device_mesh.get_coordinate())
        assert torch.equal(tile.to_local(), table[row : row + 2, column : column + 2])
        assert torch.equal(tile.full_tensor(), table)


built_by = []


@pytest.fixture(scope="module")
def slow_table():
    """A stand-in for a slow fixture; each process records that it built it."""
    built_by.append(os.getpid())
    return torch.arange(8)


@pytest.mark.world_size(2, isolation="module")
class TestWarmWorld:
    """One world serves the tests of a module: ranks start once, and build module fixtures once."""

    @pytest.mark.parametrize("index", [0, 7])
    def test_ranks_keep_the_objects_they_built(self, world, slow_table, index):
        assert world.gather(slow_table[index].item()) == [index, index]
        assert built_by == [os.getpid()]


def test_an_ordinary_test_can_start_a_world_of_its_own(worlds):
    step = 10
    with worlds(3) as world:
        assert world.run(lambda: dist.get_rank() * step) == [0, 10, 20]
        assert world.run(os.getpid) == world.run(os.getpid), "ranks stay until the block ends"
