"""Faults: how the other ranks, and the test, learn that a rank failed."""

import errno
import os
import signal

import pytest
import torch
import torch.distributed as dist

import pytest_dcp.checkpoint as dcp
from pytest_dcp import WorldError


class FullDisk(dcp.FileSystemWriter):
    """A writer that finds the disk full on one rank, and writes normally on the others."""

    def __init__(self, path, rank):
        super().__init__(path)
        self.full_on_rank = rank

    def write_data(self, plan, planner):
        if dist.get_rank() == self.full_on_rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write_data(plan, planner)


@pytest.mark.world_size(2)
def test_every_rank_learns_which_rank_could_not_write_and_the_old_checkpoint_stays(checkpoint_dir):
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=checkpoint_dir)

    with (
        pytest.raises(dcp.CheckpointException, match="rank 1") as caught,
        pytest.warns(UserWarning, match="existing checkpoint"),
    ):
        dcp.save({"weight": torch.zeros(3)}, storage_writer=FullDisk(checkpoint_dir, rank=1))

    [(rank, (cause, _))] = caught.value.failures.items()
    assert (rank, cause.errno) == (1, errno.ENOSPC)
    loaded = {"weight": torch.empty(3)}
    dcp.load(loaded, checkpoint_id=checkpoint_dir)
    assert torch.equal(loaded["weight"], torch.ones(3))


def test_a_killed_rank_is_named_with_its_signal(worlds):
    def die_on_rank_1():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()  # the survivor waits here for a rank that will never come

    with pytest.raises(WorldError, match="SIGKILL") as caught, worlds(2) as world:
        world.run(die_on_rank_1)
    assert caught.value.failures[0].rank == 1


def test_an_exception_in_one_rank_is_named_with_its_rank(worlds):
    def reject_on_rank_0():
        if dist.get_rank() == 0:
            raise ValueError("no such shard")

    with pytest.raises(WorldError, match="no such shard") as caught, worlds(2) as world:
        world.run(reject_on_rank_0)
    assert caught.value.failures[0].rank == 0
