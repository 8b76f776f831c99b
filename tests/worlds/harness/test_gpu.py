"""Worlds on GPUs; skipped, with the reason, where there are too few."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist


@pytest.mark.world_size(1, backend="nccl")
def test_an_nccl_world_of_one_reduces_on_its_gpu(device: torch.device) -> None:
    assert device.type == "cuda"
    assert dist.get_backend() == "nccl"
    value = torch.ones(3, device=device)
    dist.all_reduce(value)
    assert value.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.world_size(2, backend="nccl")
def test_nccl_ranks_have_a_gpu_each(rank: int, device: torch.device) -> None:
    value = torch.full((1,), float(rank), device=device)
    dist.all_reduce(value)
    assert value.item() == 1.0
    gathered: list[object] = [None, None]
    dist.all_gather_object(gathered, device.index)
    assert len(set(gathered)) == 2


@pytest.mark.world_size(4, backend="gloo", device="cuda")
def test_gloo_ranks_share_a_gpu(rank: int, device: torch.device) -> None:
    assert dist.get_backend() == "gloo"
    value = torch.full((1,), float(rank), device=device)
    dist.all_reduce(value)
    assert value.item() == 6.0
    gathered: list[object] = [None] * 4
    dist.all_gather_object(gathered, device.index)
    assert len(set(gathered)) == 1
