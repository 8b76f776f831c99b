"""Copied as test_many_worlds.py: sixty worlds, one after the other, between two counts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil
import pytest
from session_recorder import note

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds

FATAL = pytest.mark.xfail(strict=True, reason="its rank dies")
WORLDS = [pytest.param(n, marks=FATAL if n % 8 == 7 else ()) for n in range(40)]
FUNCTION_WORLDS = 20


def count(about: str) -> None:
    """Open descriptors and resident bytes of the controller and of the zygote."""
    controller = psutil.Process()
    (zygote,) = controller.children()
    for who, process in (("controller", controller), ("zygote", zygote)):
        note(about, who=who, fds=process.num_fds(), rss_bytes=process.memory_info().rss)


@pytest.mark.world_size(2)
def test_first() -> None:
    """Runs first: starts the processes that all later worlds share."""


def test_before() -> None:
    count("before")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("number", WORLDS)
def test_world(number: int) -> None:
    if number % 8 == 7:
        os._exit(3)


def test_function_worlds(worlds: Worlds) -> None:
    for number in range(FUNCTION_WORLDS):
        with worlds(1) as one:
            assert one.run(abs, -number) == [number]


def test_after() -> None:
    count("after")
