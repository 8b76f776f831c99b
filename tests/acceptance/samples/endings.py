"""Copied as test_endings.py: tests that end the whole session, each run in one of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

pytestmark = pytest.mark.world_size(2, timeout=60)
FOREVER_S = 600


def controller() -> int:
    """Process id of pytest itself: a rank's parent is the zygote, whose parent is pytest."""
    return psutil.Process(os.getppid()).ppid()


def test_exit(rank: int) -> None:
    if rank == 1:
        pytest.exit("enough", returncode=7)
    time.sleep(FOREVER_S)


def test_exit_beside_a_failure(rank: int) -> None:
    if rank == 1:
        pytest.exit("bye", returncode=0)
    raise ValueError("not to be missed")


def test_interrupt_beside_a_failure(rank: int) -> None:
    if rank == 1:
        raise KeyboardInterrupt
    raise ValueError("not to be missed")


@pytest.fixture
def exit_in_teardown(rank: int) -> Iterator[None]:
    yield
    if rank == 1:
        pytest.exit("after all", returncode=9)


@pytest.mark.usefixtures("exit_in_teardown")
def test_exit_in_a_survivor(rank: int) -> None:
    if rank == 0:
        os._exit(3)


def test_keyboard_interrupt(rank: int) -> None:
    if rank == 1:
        raise KeyboardInterrupt
    time.sleep(FOREVER_S)


def test_ctrl_c(rank: int) -> None:
    if rank == 1:
        os.kill(controller(), signal.SIGINT)
    time.sleep(FOREVER_S)


def test_controller_killed(rank: int) -> None:
    if rank == 1:
        os.kill(controller(), signal.SIGKILL)
    time.sleep(FOREVER_S)


def test_zygote_killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(FOREVER_S)


def test_after() -> None:
    pass
