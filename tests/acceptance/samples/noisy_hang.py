"""Copied as test_noisy_hang.py: loggers at DEBUG, as torch's own are."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch

import pytest_dcp.checkpoint as dcp

log = logging.getLogger("noisy")
pytestmark = pytest.mark.world_size(2, timeout=5)


@pytest.fixture
def noise(rank: int) -> None:
    log.setLevel(logging.DEBUG)
    for i in range(200):
        log.debug("setup %d of rank %d\nin two lines", i, rank)
    log.info("ready")


def test_hangs(rank: int, noise: None) -> None:
    for i in range(200):
        log.debug("call %d", i)
    log.warning("careful")
    if rank == 1:
        time.sleep(600)


def test_fails(rank: int, noise: None) -> None:
    log.debug("the last words")
    assert rank == 0


def test_fails_after_a_save(checkpoint_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("c10d-other").warning("a warning of torch's")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=checkpoint_dir)
    assert "'event': 'start'" not in caplog.text


def test_hangs_after_compiling(rank: int) -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    if rank == 1:
        time.sleep(600)
