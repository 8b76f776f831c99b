"""Hooks that conftest files and plugins may implement, called in the controller."""

from __future__ import annotations


def pytest_dcp_world_started(size: int, ready_s: float) -> None:
    """A world is ready: each of its `size` ranks has joined the process group.

    ready_s: the seconds that starting it took.
    """
