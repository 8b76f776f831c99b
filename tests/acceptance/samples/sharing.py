"""Copied as test_sharing.py: ranks note when they live, in sessions that share a machine.

The first worlds of the two sessions wait for each other, as long as a busy machine may need.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from session_recorder import note

LIFE_S = 0.3
MEETING_S = 100


@pytest.fixture(scope="session", autouse=True)
def life(request: pytest.FixtureRequest) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    note("life", start_s=start_s, stop_s=time.monotonic())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("time_", range(6))
def test_small(time_: int) -> None:
    if time_ == 0:
        meeting = Path(tempfile.gettempdir(), "meeting")
        meeting.mkdir(exist_ok=True)
        (meeting / str(os.getpid())).touch()
        until_s = time.monotonic() + MEETING_S
        while len(list(meeting.iterdir())) < 4 and time.monotonic() < until_s:
            time.sleep(0.01)
    time.sleep(LIFE_S)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("time_", range(2))
def test_large(time_: int) -> None:
    time.sleep(LIFE_S)
