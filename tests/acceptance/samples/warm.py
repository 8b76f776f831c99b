"""Copied as test_warm.py: a module whose tests share one world, until one of them fails."""

from __future__ import annotations

import os

import pytest
from session_recorder import note

pytestmark = pytest.mark.world_size(2, isolation="module")


@pytest.mark.parametrize("time", ["first", "second"])
def test_shares(time: str) -> None:
    note("shared", time=time, rank=os.environ["RANK"])


def test_fails(rank: int) -> None:
    assert rank == 0, "not in a warm world"


def test_after_the_failure() -> None:
    note("after the failure")
