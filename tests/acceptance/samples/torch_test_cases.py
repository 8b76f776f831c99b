"""Copied as test_torch_cases.py: torch's own multi-process classes, with our marker on them."""

from __future__ import annotations

import pytest
from session_recorder import note
from torch.testing._internal.common_distributed import MultiProcessTestCase, MultiThreadedTestCase
from torch.testing._internal.distributed._tensor.common_dtensor import DTensorTestBase, with_comms


class TestProcesses(MultiProcessTestCase):
    @pytest.mark.world_size(2)
    def test_method(self) -> None:
        note("ran")


class TestThreads(MultiThreadedTestCase):
    @pytest.mark.world_size(2)
    def test_method(self) -> None:
        note("ran")


class OwnBase(DTensorTestBase):
    """A suite's own class in between."""


@pytest.mark.world_size(2)
class TestTensors(OwnBase):
    @with_comms
    def test_method(self) -> None:
        note("ran")


class TestLeftToTorch(MultiProcessTestCase):
    def test_unmarked(self) -> None:
        pass
