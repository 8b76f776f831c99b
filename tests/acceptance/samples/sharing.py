"""Copied as test_sharing.py: ranks note when they live, in sessions that share a machine."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from session_recorder import note

LIFE_S = 0.3


@pytest.fixture(scope="session", autouse=True)
def life(request: pytest.FixtureRequest) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    note("life", start_s=start_s, stop_s=time.monotonic())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("time_", range(6))
def test_small(time_: int) -> None:
    time.sleep(LIFE_S)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("time_", range(2))
def test_large(time_: int) -> None:
    time.sleep(LIFE_S)
