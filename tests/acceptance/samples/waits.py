"""Copied as test_waits.py: tests that wait for any child process, or ignore SIGCHLD."""

from __future__ import annotations

import os
import signal

import pytest


def wait_for_any() -> int:
    """The exit code of a child that ends at once, waited for as any child."""
    child = os.fork()
    if child == 0:
        os._exit(7)
    found, status = os.waitpid(-1, 0)
    assert found == child
    return os.waitstatus_to_exitcode(status)


@pytest.mark.world_size(2, isolation="module")
def test_in_ranks() -> None:
    assert wait_for_any() == 7


def test_in_the_controller() -> None:
    assert wait_for_any() == 7
    assert os.waitpid(-1, os.WNOHANG) == (0, 0)


@pytest.mark.world_size(2, isolation="module")
def test_world_between() -> None:
    pass


def test_hears_of_no_child() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


@pytest.mark.world_size(2)
def test_world_after() -> None:
    assert wait_for_any() == 7
