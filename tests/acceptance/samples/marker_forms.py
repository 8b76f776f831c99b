"""Copied as test_marker_forms.py: every place and shape of the marker; each test notes its size."""

from __future__ import annotations

import os
import unittest

import pytest
import torch.distributed as dist
from session_recorder import note

pytestmark = [pytest.mark.world_size(2)]


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> None:
    """Record the rank's size and number; both sources must agree."""
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])
    note("size", test=request.node.name, size=dist.get_world_size(), rank=dist.get_rank())


def test_module() -> None:
    pass


@pytest.mark.world_size(1)
def test_function() -> None:
    pass


@pytest.mark.world_size([1, 3])
def test_list() -> None:
    pass


@pytest.mark.world_size((2,))
def test_list_of_one(world_size: int) -> None:
    assert world_size == dist.get_world_size()


@pytest.mark.world_size([1, 2])
@pytest.mark.parametrize("other", ["a", "b"])
def test_list_and_other(other: str, world_size: int, rank: int) -> None:
    assert rank < world_size


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.world_size(3))])
def test_param(size: int) -> None:
    pass


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.world_size
def test_own_parametrization(world_size: int) -> None:
    assert world_size == dist.get_world_size()


@pytest.mark.parametrize(("world_size", "other"), [(3, "a")])
@pytest.mark.world_size(timeout=60)
def test_own_parametrization_of_two(world_size: int, other: str) -> None:
    assert world_size == dist.get_world_size()


@pytest.mark.world_size(3)
class TestClass:
    def test_class(self) -> None:
        pass

    @pytest.mark.world_size(1)
    def test_function_in_class(self) -> None:
        pass

    @pytest.mark.world_size(1)
    class TestInner:
        def test_inner_class(self) -> None:
            pass


class TestOfUnittest(unittest.TestCase):
    of_class = 0

    @classmethod
    def setUpClass(cls) -> None:
        cls.of_class = dist.get_world_size()

    def setUp(self) -> None:
        self.of_test = dist.get_world_size()

    @pytest.mark.world_size(3)
    def test_method(self) -> None:
        assert {self.of_class, self.of_test} == {dist.get_world_size()}
