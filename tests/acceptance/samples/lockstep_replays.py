"""Copied as test_lockstep_replays.py: a property that records the values it is run with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import event, given, reproduce_failure, settings, target
from hypothesis import strategies as st
from session_recorder import note

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld

settings.register_profile("here", deadline=None, max_examples=30)
settings.load_profile("here")


def reproduced(test):  # type: ignore[no-untyped-def]
    """With the blob that an earlier session printed."""
    if "BLOB" not in os.environ:
        return test
    version, blob = os.environ["BLOB"].split()
    return reproduce_failure(version, blob.encode())(test)


@pytest.mark.world_size(2)
@reproduced
@given(x=st.integers())
def test_fails(rank: int, x: int) -> None:
    note("fails", rank=rank, x=x)
    assert x < 1000 or rank == 0


@pytest.mark.world_size(2)
@given(x=st.integers(0, 100))
def test_passes(rank: int, x: int) -> None:
    note("passes", rank=rank, x=x)
    event("even" if x % 2 == 0 else "odd")
    target(float(x))


@pytest.mark.world_size([1, 2])
@given(x=st.integers(0, 1000))
def test_fails_in_larger_worlds(world_size: int, x: int) -> None:
    note("larger", size=world_size, x=x)
    assert x < 100 or world_size == 1


@pytest.mark.world_size(2)
@settings(max_examples=3)
@given(x=st.integers(0, 100))
def test_loses_a_rank(world: RankWorld, x: int) -> None:
    world.barrier()
    world.kill(1)
