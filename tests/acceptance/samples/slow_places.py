"""Copied as test_slow_places.py: the slow part is outside the test's own work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults.crashes.crash_state import recording_dir
from pytest_dcp.properties import Layout, MeshSpec, StateSpec, TensorSpec, assert_round_trip


class SlowToShow:
    """A test's argument, which pytest shows when it writes the report of a failure."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __repr__(self) -> str:
        time.sleep(self.seconds)
        return f"<shown after {self.seconds:g} s>"


class SlowToTellError(Exception):
    """Its text takes longer than peers get once a rank has failed."""

    def __str__(self) -> str:
        time.sleep(1.5)
        return "told late"


class FatalToShow:
    def __repr__(self) -> str:
        os._exit(4)


@pytest.fixture
def slow(rank: int) -> SlowToShow:
    return SlowToShow(3.0 if rank else 0.0)


@pytest.fixture
def fatal() -> FatalToShow:
    return FatalToShow()


@pytest.mark.world_size(2)
def test_first(rank: int) -> None:
    assert rank in (0, 1)


@pytest.mark.world_size(3, timeout=60)
def test_peers_report_slowly(rank: int, slow: SlowToShow) -> None:
    raise ValueError("boom" if rank != 2 else "another")


@pytest.mark.world_size(2, timeout=2)
def test_reports_beyond_the_limit(rank: int, slow: SlowToShow) -> None:
    assert rank == 0


@pytest.mark.world_size(2, timeout=60)
def test_text_is_slow(rank: int) -> None:
    raise SlowToTellError if rank == 1 else ValueError("boom")


def raise_slow_text() -> None:
    raise SlowToTellError if os.environ["RANK"] == "1" else ValueError("boom")


def test_text_is_slow_in_a_function(worlds: object) -> None:
    with worlds(2) as w:  # type: ignore[operator]  # the fixture
        w.run(raise_slow_text)


HANGS_S = 3.0
SHARDED = StateSpec({"w": TensorSpec((4,))}).on(Layout(MeshSpec((2,)), (Shard(0),)))


class FailsAloneEngine:
    """Its load raises on rank 0, while rank 1 waits in a collective forever."""

    save = staticmethod(dcp.save)

    @staticmethod
    def load(state: object, **keywords: object) -> None:
        if dist.get_rank() == 0:
            raise ValueError("met by rank 0 alone")
        dist.recv(torch.zeros(1), src=0)


@pytest.mark.world_size(2, timeout=HANGS_S)
def test_law_of_an_engine_that_fails_on_one_rank(checkpoint_dir: Path) -> None:
    assert_round_trip(SHARDED, SHARDED, checkpoint_dir, dcp=FailsAloneEngine())


@pytest.mark.world_size(2, timeout=HANGS_S)
def test_recording_that_fails_on_one_rank(rank: int, tmp_path: Path) -> None:
    def step() -> bytes:
        if rank == 0:
            raise ValueError("met by rank 0 alone")
        dist.recv(torch.zeros(1), src=0)
        return b""

    recording_dir(tmp_path, rank).agree("ready", step)


@pytest.mark.world_size(2)
def test_dies_while_it_reports(rank: int, fatal: FatalToShow) -> None:
    if rank == 1:
        raise ValueError("boom")
