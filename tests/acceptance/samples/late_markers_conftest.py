"""Copied as conftest.py: adds markers to collected tests, in time and too late."""

from __future__ import annotations

import os

import pytest

world_size = pytest.mark.world_size
WRONG = {
    "test_gets_a_list": world_size([2, 4]),
    "test_gets_zero": world_size(0),
    "test_gets_a_typing_error": world_size(2, backnd="gloo"),
}


def add(item: pytest.Item, name: str) -> None:
    if item.name == name:
        item.add_marker(world_size(2))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name in WRONG and os.environ.get("ADD") == "wrong":
            item.add_marker(WRONG[item.name])
        add(item, "test_added_in_time")
    if os.environ.get("ADD") == "doctest":
        next(item for item in items if item.name.endswith("documented")).add_marker(world_size(2))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    for item in session.items:
        add(item, "test_added_in_the_loop")
        add(item, "test_added_in_the_loop_expected_to_fail")
    if os.environ.get("ADD") == "new order":
        session.items.reverse()


def pytest_runtest_setup(item: pytest.Item) -> None:
    add(item, "test_added_before_setup")


def pytest_runtest_call(item: pytest.Item) -> None:
    add(item, "test_added_before_call")
