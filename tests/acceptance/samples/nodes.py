"""Tests in worlds of two nodes; the last one loses a node in the middle of a save."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from session_recorder import note

import pytest_dcp.checkpoint as dcp

SAVED = Path(os.environ["SESSION_RECORD"]).parent / "saved"
pytestmark = pytest.mark.world_size(2)


def test_place(rank: int, local_rank: int) -> None:
    total = torch.ones(1)
    dist.all_reduce(total)
    names = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    note("place", rank=rank, local_rank=local_rank, **{name: os.environ[name] for name in names})


def test_fails_on_node_1(rank: int) -> None:
    assert rank == 0


def test_checkpoint(rank: int, checkpoint_dir: Path, device_mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.arange(8.0)
    dcp.save({"w": distribute_tensor(whole, device_mesh, [Shard(0)])}, checkpoint_id=checkpoint_dir)
    target = {"w": distribute_tensor(torch.zeros(8), device_mesh, [Shard(0)])}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["w"].full_tensor().tolist() == whole.tolist()


def test_a_node_dies_in_a_save(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dcp.save({"w": torch.full((1000,), 1.0), "rank": dcp.PerRank(rank)}, checkpoint_id=SAVED)
    if rank == 1:
        monkeypatch.setattr(os, "fsync", lambda fd: kill_node())
    try:
        dcp.save({"w": torch.full((1000,), 2.0), "rank": dcp.PerRank(rank)}, checkpoint_id=SAVED)
    except dcp.CheckpointException as error:
        note("survivor", rank=rank, text=str(error))
        raise


def kill_node() -> None:
    """Kill this node's processes: the rank, its zygote, its seat and the launcher's agent."""
    pids = [os.getpid()]
    for _ in range(3):
        stat = Path(f"/proc/{pids[-1]}/stat").read_text()
        pids.append(int(stat.rpartition(")")[2].split()[1]))
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)


def test_comes_too_late() -> None:
    pass
