"""Copied as test_late_markers.py: tests that get a marker of ours when they were collected."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from session_recorder import note


def body(request: pytest.FixtureRequest) -> None:
    """Every test's: says that it ran, and in how large a world."""
    note("ran", test=request.node.name, size=os.environ.get("WORLD_SIZE", ""))


def documented() -> int:
    """An item that is no test function.

    >>> documented()
    7
    """
    return 7


def test_gets_a_list(request: pytest.FixtureRequest) -> None:
    body(request)


def test_gets_zero(request: pytest.FixtureRequest) -> None:
    body(request)


def test_gets_a_typing_error(request: pytest.FixtureRequest) -> None:
    body(request)


def test_added_in_time(request: pytest.FixtureRequest) -> None:
    body(request)


def test_added_in_the_loop(request: pytest.FixtureRequest) -> None:
    body(request)


@pytest.mark.xfail
def test_added_in_the_loop_expected_to_fail(request: pytest.FixtureRequest) -> None:
    body(request)


def test_added_before_setup(request: pytest.FixtureRequest) -> None:
    body(request)


def test_added_before_call(request: pytest.FixtureRequest) -> None:
    body(request)


@pytest.fixture
def marked_in_setup(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.world_size(4))


@pytest.fixture
def marked_in_teardown(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    request.node.add_marker(pytest.mark.world_size(4))


@pytest.mark.usefixtures("marked_in_setup")
def test_added_in_a_fixture(request: pytest.FixtureRequest) -> None:
    body(request)


@pytest.mark.usefixtures("marked_in_teardown")
def test_added_in_teardown() -> None:
    pass


@pytest.mark.xfail
def test_added_in_the_body(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.world_size(4))


def test_added_to_the_module_in_the_body_and_skipped(request: pytest.FixtureRequest) -> None:
    module = request.node.getparent(pytest.Module)
    mark = pytest.mark.world_size(4)
    module.own_markers.append(mark.mark)
    try:
        pytest.skip("with a marker that is too late")
    finally:
        request.addfinalizer(lambda: module.own_markers.remove(mark.mark))


@pytest.mark.world_size(2)
@pytest.mark.xfail
@pytest.mark.usefixtures("marked_in_setup")
def test_another_in_a_rank_s_fixture(request: pytest.FixtureRequest) -> None:
    body(request)


@pytest.mark.world_size(2)
@pytest.mark.xfail
def test_another_in_one_rank_s_body(request: pytest.FixtureRequest, rank: int) -> None:
    if rank == 1:
        request.node.add_marker(pytest.mark.world_size(4))


@pytest.mark.world_size(2)
def test_the_same_again(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.world_size(2))
    body(request)
