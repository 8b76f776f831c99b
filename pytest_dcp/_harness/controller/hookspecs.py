"""Hooks of ours that plugins and conftests may implement.

All but `pytest_dcp_rank_state` are called in the controller. A marked test runs in ranks, which are
processes of their own: data that a plugin gathers there in memory (snapshots used, results of
benchmarks) is missing in the process that reports the session. With `pytest_dcp_rank_state` and
`pytest_dcp_take_rank_states` a plugin sends it home. Implementations that must also load without
pytest_dcp are declared `@pytest.hookimpl(optionalhook=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def pytest_dcp_world_started(size: int, ready_s: float) -> None:
    """A world is ready: each of its `size` ranks has joined the process group.

    ready_s: the seconds that starting it took.
    """


def pytest_dcp_rank_state(item: pytest.Item) -> object:
    """In every rank, when a marked test has been torn down: the plugin's data of this rank.

    Anything that can be pickled, or None for nothing. Each plugin's own value goes to the same
    plugin's `pytest_dcp_take_rank_states`.
    """


def pytest_dcp_take_rank_states(item: pytest.Item, states: Sequence[object]) -> None:
    """In the process that reports the session, before the test's teardown is reported.

    `states` are the ranks' results, in rank order; None for a rank without data or a lost rank. Not
    called when no rank had anything.
    """


@pytest.hookspec(firstresult=True)
def pytest_dcp_carries(fixture: str) -> bool | None:
    """Whether the plugin carries the data that this fixture of another plugin gathers in ranks.

    True lets marked tests use a fixture whose plugin is known to lose its data in ranks.
    """
