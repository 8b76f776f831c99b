"""Copied as test_renamed.py: our marker under the name `dcp_world`."""

from __future__ import annotations

import os

import pytest


@pytest.mark.dcp_world(2)
def test_renamed(rank: int) -> None:
    assert os.environ["RANK"] == str(rank)


@pytest.mark.dcp_world([1, 3])
def test_renamed_list(world_size: int) -> None:
    assert os.environ["WORLD_SIZE"] == str(world_size)
