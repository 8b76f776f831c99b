"""Copied as test_foreign.py: `world_size` is another plugin's marker, whatever its arguments."""

from __future__ import annotations

import os

import pytest


@pytest.mark.world_size("any", [1], of="theirs")
def test_foreign() -> None:
    assert "RANK" not in os.environ


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.world_size
def test_foreign_with_a_parameter(world_size: int) -> None:
    assert "RANK" not in os.environ
