"""Copied as conftest.py: fixtures of every scope that note where and when they live."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from session_recorder import note


def _lives(request: pytest.FixtureRequest) -> Iterator[int]:
    where = os.environ.get("RANK", "controller")
    note("lifetime", scope=request.scope, event="set up", where=where)
    yield os.getpid()
    note("lifetime", scope=request.scope, event="torn down", where=where)


@pytest.fixture(scope="session")
def of_session(request: pytest.FixtureRequest) -> Iterator[int]:
    yield from _lives(request)


@pytest.fixture(scope="module")
def of_module(request: pytest.FixtureRequest, of_session: int) -> Iterator[int]:
    yield from _lives(request)


@pytest.fixture(scope="class")
def of_class(request: pytest.FixtureRequest, of_module: int) -> Iterator[int]:
    yield from _lives(request)


@pytest.fixture
def of_function(request: pytest.FixtureRequest, of_class: int) -> Iterator[int]:
    yield from _lives(request)


@pytest.fixture(autouse=True)
def automatic(request: pytest.FixtureRequest) -> None:
    request.node.automatic_pid = os.getpid()
