"""Copied as test_mixed.py: one test of each kind, to be run under any plugin that distributes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds


def test_ordinary() -> None:
    assert "RANK" not in os.environ


def test_ordinary_that_fails() -> None:
    assert 1 == 2


def test_ordinary_subtests(subtests: pytest.Subtests) -> None:
    with subtests.test("sub", i=1):
        assert os.environ.get("RANK") is None


@pytest.mark.world_size(2)
def test_marked(rank: int) -> None:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    assert total.item() == 1


@pytest.mark.world_size([1, 2, 3])
def test_list(rank: int) -> None:
    assert rank < 2, "three are too many"


@pytest.mark.world_size(3)
def test_cause_and_waiting_peers(rank: int) -> None:
    print("printed by", rank)
    print("printed by all", file=sys.stderr)
    logging.getLogger("of_all").warning("logged by all")
    assert rank != 1, "the cause"
    dist.all_reduce(torch.ones(1))


@pytest.mark.world_size(2)
def test_all_skip() -> None:
    pytest.skip("all of us")


@pytest.mark.world_size(2)
@pytest.mark.xfail(reason="known")
def test_xfails(rank: int) -> None:
    assert rank == 0


@pytest.mark.world_size(2)
def test_subtests(subtests: pytest.Subtests, rank: int) -> None:
    for i in range(3):
        with subtests.test("sub", i=i):
            assert not (rank == 1 and i == 2)


@pytest.mark.world_size(2)
def test_dies(rank: int) -> None:
    if rank == 1:
        os._exit(0)


@pytest.fixture
def broken_teardown(rank: int) -> object:
    yield
    assert rank != 1


@pytest.mark.world_size(2)
@pytest.mark.usefixtures("broken_teardown")
def test_fails_in_teardown() -> None:
    pass


@pytest.mark.world_size(2)
def test_properties(rank: int, record_property: Callable[[str, object], None]) -> None:
    record_property("same", "on all")
    record_property("own", rank)
    warnings.warn("told by all ranks", UserWarning, stacklevel=1)


@pytest.mark.world_size(2)
@pytest.mark.xdist_group("together")
def test_of_a_group() -> None:
    pass


@pytest.mark.xdist_group("together")
def test_function_world(worlds: Worlds) -> None:
    with worlds(2) as world:
        assert world.run(os.getenv, "RANK") == ["0", "1"]
