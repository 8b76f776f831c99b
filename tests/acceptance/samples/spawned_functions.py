"""Copied as test_spawned_functions.py: functions in worlds of fresh interpreters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_dcp import WorldError

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds


def rank_times(factor: int) -> int:
    print(f"times {factor}")
    return factor * int(os.environ["RANK"])


def fails(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise ValueError(f"in rank {rank}")


def test_functions(worlds: Worlds) -> None:
    with worlds(2) as two:
        assert two.run(rank_times, 3) == [0, 3]
        base = 10
        assert two.run(lambda: base + rank_times(1)) == [10, 11]
        with pytest.raises(WorldError, match="rank 1: ValueError: in rank 1"):
            two.run(fails, "1")
        assert two.run(os.getppid) == [os.getpid()] * 2
