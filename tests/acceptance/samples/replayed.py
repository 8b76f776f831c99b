import os

import pytest
import torch


def save(folder, value):
    with open(folder / "new", "wb") as file:
        torch.save(value, file)
    os.rename(folder / "new", folder / "state")


def check_states(faulty_storage, folder):
    folder.mkdir(exist_ok=True)
    with faulty_storage.record() as trace:
        save(folder, torch.zeros(1))
    for state in trace.crash_states("posix"):
        assert not state


def test_alone(faulty_storage, checkpoint_dir):
    check_states(faulty_storage, checkpoint_dir)


@pytest.mark.world_size(2)
def test_in_one_rank(faulty_storage, checkpoint_dir, rank):
    with faulty_storage.record() as trace:
        if rank == 0:
            checkpoint_dir.mkdir(exist_ok=True)
            save(checkpoint_dir, torch.zeros(1))
    if rank == 0:
        assert not trace.crash_states("posix")


@pytest.mark.world_size(2)
def test_one_rank_fails(faulty_storage, checkpoint_dir, rank):
    with faulty_storage.record() as trace:
        if rank == 0:
            checkpoint_dir.mkdir(exist_ok=True)
            save(checkpoint_dir, torch.zeros(1))
    if rank == 0:
        trace.crash_states("posix")
        raise ValueError("as the state made it")
