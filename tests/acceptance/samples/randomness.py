"""Copied as test_randomness.py: the numbers each rank draws, in a fixture and in the test."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from session_recorder import note


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.fixture
def drawn() -> list[float]:
    return draws()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_draws(name: str, drawn: list[float]) -> None:
    note("draws", name=name, fixture=drawn, test=draws())
