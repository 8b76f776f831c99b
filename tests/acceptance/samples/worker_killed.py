"""Copied as test_worker_killed.py: an ordinary test kills its xdist worker, whose worlds live."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from session_recorder import note

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds


@pytest.mark.world_size(2, isolation="module")
def test_warm() -> None:
    note("rank", pid=os.getpid(), parent=os.getppid())


def live(seconds: float) -> None:
    note("rank", pid=os.getpid(), parent=os.getppid())
    time.sleep(seconds)


def test_kills_its_worker(worlds: Worlds) -> None:
    with worlds(2) as idle:
        idle.run(live, 0)
        os.kill(os.getpid(), signal.SIGKILL)
