"""Copied as test_interrupted.py: tests of warm worlds in which the session is interrupted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from session_recorder import note

FOREVER_S = 600
warm = pytest.mark.world_size(2, isolation="module", timeout=60)


def torn_down(scope: str) -> None:
    note("torn down", scope=scope, rank=os.environ["RANK"])


@pytest.fixture(scope="session")
def of_session() -> Iterator[None]:
    yield
    torn_down("session")


@pytest.fixture(scope="module")
def of_module(of_session: None) -> Iterator[None]:
    yield
    torn_down("module")
    raise RuntimeError("torn down with the module")


@pytest.fixture
def of_test(of_module: None) -> Iterator[None]:
    yield
    torn_down("function")


@pytest.fixture
def lasting_teardown(of_module: None) -> Iterator[None]:
    yield
    wait()


def wait(alarm: bool = False) -> None:
    note("waits", rank=os.environ["RANK"])
    try:
        if alarm:  # a rank's parent is the zygote, whose parent is pytest
            os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGALRM)
        time.sleep(FOREVER_S)
    finally:
        note("went on", rank=os.environ["RANK"])


@warm
def test_sleeps(of_test: None) -> None:
    wait()


@warm
def test_hangs(of_test: None, world: Any) -> None:
    of_rank_1 = psutil.Process(world.broadcast(os.getpid(), src=1))
    if world.rank == 1:
        dist.all_reduce(torch.ones(1))
    await_rest(of_rank_1)
    note("waits", rank="1")
    wait()


def await_rest(process: psutil.Process) -> None:
    """Return when the process sleeps, and slept through a while: it hangs."""
    seen = None
    while (now := (process.status(), process.num_ctx_switches())) != seen:
        seen = now
        time.sleep(0.5)
    assert now[0] == psutil.STATUS_SLEEPING


@warm
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(x=st.integers())
def test_property(of_test: None, x: int) -> None:
    wait()


@warm
def test_lasts_in_teardown(lasting_teardown: None) -> None:
    pass


@warm
def test_exits_in_a_rank(of_test: None, rank: int) -> None:
    if rank == 1:
        pytest.exit("enough", returncode=7)


@warm
def test_takes_too_long(of_test: None, world: Any) -> None:
    if world.rank == 1:
        world.barrier()
    wait(alarm=True)


def test_functions_take_too_long(worlds: Callable[..., Any]) -> None:
    with worlds(1) as w:
        w.run(wait, alarm=True)


@warm
def test_after(of_session: None) -> None:
    note("after", rank=os.environ["RANK"])
