"""Copied as test_mesh_forms.py: worlds whose shape leaves no other size."""

from __future__ import annotations

import pytest


@pytest.mark.world_size(4, mesh=(2, 2))
def test_mesh() -> None:
    pass


@pytest.mark.world_size(2)
def test_line() -> None:
    pass
