"""Any sequence of saves, crashes, loads, reshards and prunes is as a plain dict would have it."""

from __future__ import annotations

import unittest

import pytest
from hypothesis import settings

from pytest_dcp.properties import CheckpointMachine
from support.unsynced import UNSYNCED

RUNS = settings(
    max_examples=max(settings().max_examples // 8, 1), stateful_step_count=12, deadline=None
)


class InAWorld(CheckpointMachine):
    """Drawn by one engine, run by four ranks."""

    world_size = 4
    dcp = UNSYNCED
    models = ("kill",)


TestAlone: type[unittest.TestCase] = CheckpointMachine.TestCase
TestAlone.settings = RUNS

TestInAWorld: type[unittest.TestCase] = pytest.mark.world_size(4)(InAWorld.TestCase)
TestInAWorld.settings = RUNS
