"""Copied as conftest.py: a plugin that gathers in memory, and carries that home from ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from session_recorder import note

_gathered: list[object] = []


@pytest.fixture
def gathered() -> list[object]:
    return _gathered


def pytest_dcp_rank_state(item: pytest.Item) -> object:
    found, _gathered[:] = [*_gathered], []
    return found or None


def pytest_dcp_take_rank_states(item: pytest.Item, states: Sequence[object]) -> None:
    note("taken", item=item.name, states=list(states))


class HasNoTaker:
    """Another plugin, which forgot the second half."""

    def pytest_dcp_rank_state(self, item: pytest.Item) -> object:
        return 1 if item.name == "test_gathers" else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(HasNoTaker(), "has-no-taker")
