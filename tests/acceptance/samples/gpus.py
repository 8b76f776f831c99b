"""Copied as test_gpus.py: worlds that need GPUs."""

from __future__ import annotations

import pytest


@pytest.mark.world_size(3, backend="nccl")
def test_nccl() -> None:
    pass


@pytest.mark.world_size(2, backend="gloo", device="cuda")
def test_gloo_on_cuda() -> None:
    pass


@pytest.mark.world_size(2)
def test_gloo() -> None:
    pass
