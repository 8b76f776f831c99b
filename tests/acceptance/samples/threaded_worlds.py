"""Worlds of threads: each rank is a thread of one process."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp

PIDS = []


@pytest.mark.world_size(4, backend="threaded")
def test_collectives_meet(rank, world_size, local_rank):
    tensor = torch.ones(2) * rank
    dist.all_reduce(tensor)
    assert tensor.tolist() == [6.0, 6.0]
    assert (rank, world_size, local_rank) == (dist.get_rank(), dist.get_world_size(), rank)
    assert threading.current_thread().name == f"rank {rank}"
    PIDS.append(os.getpid())
    dist.barrier()
    assert len(PIDS) == 4
    assert len(set(PIDS)) == 1


@pytest.mark.parametrize("cut", [0, 1])
@pytest.mark.world_size([2, 3], backend="threaded")
def test_a_checkpoint_of_threads(rank, device_mesh, world_size, checkpoint_dir, cut):
    full = torch.arange(30.0).reshape(6, 5)
    saved = {
        "w": distribute_tensor(full, device_mesh, [Shard(cut)]),
        "own": dcp.PerRank(rank),
        "step": 7,
    }
    dcp.save(saved, checkpoint_id=checkpoint_dir)
    state = {
        "w": distribute_tensor(torch.zeros(6, 5), device_mesh, [Shard(1 - cut)]),
        "own": dcp.PerRank(-1),
        "step": 0,
    }
    dcp.load(state, checkpoint_id=checkpoint_dir)
    assert torch.equal(state["w"].full_tensor(), full)
    assert (state["own"].value, state["step"]) == (rank, 7)


@pytest.mark.world_size(2, backend="threaded", mesh=(1, 2), mesh_dim_names=("dp", "tp"))
def test_the_mesh_is_that_of_the_marker(device_mesh, rank):
    assert device_mesh["tp"].get_local_rank() == rank


@pytest.mark.world_size(3, backend="threaded")
def test_one_fails_while_others_wait(rank):
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


@pytest.mark.world_size(3, backend="threaded")
def test_one_fails_while_another_sleeps(rank):
    if rank == 1:
        raise ValueError("the cause")
    if rank == 2:
        time.sleep(60)


@pytest.mark.world_size(2, backend="threaded")
def test_all_skip():
    pytest.skip("not here")


@pytest.mark.world_size(2, backend="threaded")
def test_some_skip(rank):
    if rank:
        pytest.skip("not here")


@pytest.mark.world_size(2, backend="threaded")
@pytest.mark.xfail(raises=ValueError, strict=True)
def test_expected_to_fail(rank):
    raise ValueError(rank)


@pytest.mark.world_size(2, backend="threaded")
def test_no_world(world):
    pass
