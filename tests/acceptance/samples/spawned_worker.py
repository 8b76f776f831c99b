"""Copied as spawned_worker.py, to be run by name: ranks that a worker of xdist spawned."""

from __future__ import annotations

import pytest
from session_recorder import note


@pytest.mark.world_size(1)
def test_worker(worker_id: str) -> None:
    note("worker", id=worker_id)


@pytest.mark.world_size(1)
def test_fails_in_worker(worker_id: str) -> None:
    assert worker_id == "master"
