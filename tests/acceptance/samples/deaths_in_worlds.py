"""Copied as test_deaths_in_worlds.py: ranks lost as asked, in worlds that a test starts itself."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from pytest_dcp import LostRank, WorldError
from pytest_dcp._harness.controller.worlds_fixture import Worlds

FOREVER_S = 600


def test_worlds_go_on(worlds: Worlds) -> None:
    with worlds(4) as w:
        w.kill(2)
        lost = LostRank(2, "was killed by signal 9 (SIGKILL) as asked: kill(2) by the test")
        assert w.run(dist.get_rank) == [0, 1, lost, 3]
        running = w.start(lambda: time.sleep(0.2) or dist.get_rank())
        w.pause(0)
        w.kill(1)
        assert w.survivors == (3,)
        results = running.result()
        assert running.result() is results
        assert [type(result) for result in results[:3]] == [LostRank] * 3
        assert "stopped as asked: pause(0) by the test" in results[0].reason
        assert results[3] == 3
        assert w.run(dist.get_rank)[3] == 3


def test_worlds_pause_and_resume(worlds: Worlds) -> None:
    with worlds(2) as w:
        w.pause(1)
        running = w.start(dist.get_rank)
        w.resume(1)
        assert running.result() == [0, 1]
        with pytest.raises(ValueError, match="from 0 to 1"):
            w.kill(2)
        w.kill(1)
        with pytest.raises(WorldError, match="rank 1 is gone"):
            w.pause(1)


def test_worlds_without_a_survivor(worlds: Worlds) -> None:
    with worlds(2) as w:
        running = w.start(time.sleep, FOREVER_S)
        with pytest.raises(WorldError, match="still runs"):
            w.run(dist.get_rank)
        w.kill(0)
        w.kill(1)
        with pytest.raises(WorldError, match="no rank is left") as caught:
            running.result()
        assert "rank 1: was killed" in str(caught.value)
        with pytest.raises(WorldError, match="has ended"):
            w.run(dist.get_rank)


def test_worlds_without_a_look_at_the_result(worlds: Worlds) -> None:
    with worlds(2) as w:
        w.start(int, "not a number")
