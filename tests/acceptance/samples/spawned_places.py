"""Copied as test_spawned_places.py: collected slowly by ranks that were spawned."""

from __future__ import annotations

import os
import time

import pytest

if "RANK" in os.environ:
    time.sleep(4)


@pytest.fixture
def hang(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.world_size(2, timeout=3)
def test_passes(rank: int) -> None:
    assert rank in (0, 1)


@pytest.mark.world_size(2, timeout=3)
def test_hangs_in_setup(rank: int, hang: None) -> None:
    pass
