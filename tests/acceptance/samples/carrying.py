"""Copied as test_carrying.py: tests whose plugins gather state in ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

Record = Callable[[str, object], None]


@pytest.mark.world_size(2)
def test_records(
    record_testsuite_property: Record, record_xml_attribute: Record, rank: int
) -> None:
    record_testsuite_property("arch", "of all")
    record_testsuite_property("rank", rank)
    record_xml_attribute("assertions", "five")


@pytest.mark.world_size(3)
def test_gathers(gathered: list[object], rank: int) -> None:
    if rank != 1:
        gathered.append(f"by {rank}")


@pytest.mark.world_size(2)
def test_fails(gathered: list[object], rank: int) -> None:
    gathered.append("before it failed")
    assert rank == 1


@pytest.mark.world_size(2)
def test_cannot_be_pickled(gathered: list[object]) -> None:
    gathered.append(threading.Lock())


@pytest.mark.world_size(2, isolation="module")
class TestWarm:
    def test_first(self, gathered: list[object], rank: int) -> None:
        gathered.append(f"first {rank}")

    def test_second(self, gathered: list[object]) -> None:
        pass


def test_ordinary(gathered: list[object]) -> None:
    gathered.append("in the controller")
