"""Copied as test_spawned_warm.py: one world of fresh interpreters for all tests of the module."""

from __future__ import annotations

import os

import pytest
from session_recorder import note

pytestmark = pytest.mark.world_size(2, isolation="module")
IDS = (
    "plain",
    "a::b",
    "a/b.py::c",
    "x[y]",
    "two words",
    "quo'te\"s",
    "-k",
    "ünï",
    "$(HOME);&|",
    "",
)


@pytest.mark.parametrize("text", IDS, ids=IDS)
def test_id(text: str, rank: int, request: pytest.FixtureRequest) -> None:
    assert request.node.callspec.params == {"text": text}
    note("id", text=text, rank=rank, pid=os.getpid())


def test_skips() -> None:
    pytest.skip("all of us")


@pytest.mark.xfail(reason="known", strict=True)
def test_xfails(rank: int) -> None:
    assert rank == 0
