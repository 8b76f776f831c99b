"""Copied as test_lastfailed.py: one world test fails until a file named `fixed` is there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.world_size(2)


def test_passes() -> None:
    pass


def test_fails_at_first(rank: int) -> None:
    assert rank == 0 or Path("fixed").exists()


def test_passes_too() -> None:
    pass
