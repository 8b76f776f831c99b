"""Copied as test_faults.py: ranks that harm themselves. None of it takes long when handled well.

The time limit is far above the duration of a case: a case that only the limit ends takes too long.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from pytest_dcp._harness.rank.this_rank import current
from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(4, timeout=30)
FOREVER_S = 600


def all_reduce() -> None:
    dist.all_reduce(torch.ones(1))


@pytest.fixture
def note_of_teardown(request: pytest.FixtureRequest, rank: int) -> Iterator[None]:
    """Leaves a file for each rank that was torn down."""
    yield
    Path(f"torn-down-{request.node.name}-{rank}").touch()


# Exceptions.


def test_one_rank_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("boom")
    all_reduce()


def test_one_rank_asserts(rank: int) -> None:
    assert rank != 2


def test_all_ranks_assert() -> None:
    numbers = [1]
    assert len(numbers) == 2


@pytest.mark.usefixtures("note_of_teardown")
def test_pytest_fail(rank: int) -> None:
    if rank == 3:
        pytest.fail("explicit")


def test_sys_exit(rank: int) -> None:
    if rank == 1:
        sys.exit(0)


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()

    def __reduce__(self) -> NoReturn:
        raise TypeError("no")


class Unprintable(Exception):
    def __str__(self) -> NoReturn:
        raise TypeError("no text")

    __repr__ = __str__


class Unusual(BaseException):
    pass


def test_unpicklable_exception(rank: int) -> None:
    if rank == 1:
        raise Unpicklable


def test_unprintable_exception(rank: int) -> None:
    if rank == 1:
        raise Unprintable


def test_exception_that_is_no_exception(rank: int) -> None:
    if rank == 1:
        raise Unusual("not an Exception")


# Fixtures.


@pytest.fixture
def raise_in_setup(rank: int) -> None:
    if rank == 1:
        raise ValueError("in setup")
    all_reduce()


@pytest.fixture
def exit_in_setup(rank: int) -> None:
    if rank == 1:
        os._exit(0)


@pytest.fixture
def raise_in_teardown(rank: int) -> Iterator[None]:
    yield
    if rank == 2:
        raise ValueError("in teardown")


@pytest.fixture
def exit_in_teardown(rank: int) -> Iterator[None]:
    yield
    if rank == 2:
        os._exit(0)


@pytest.mark.usefixtures("raise_in_setup")
def test_raises_in_setup() -> None:
    pass


@pytest.mark.usefixtures("exit_in_setup")
def test_exits_in_setup() -> None:
    pass


@pytest.mark.usefixtures("raise_in_teardown")
def test_raises_in_teardown() -> None:
    pass


@pytest.mark.usefixtures("exit_in_teardown")
def test_exits_in_teardown() -> None:
    pass


@pytest.mark.usefixtures("raise_in_teardown")
def test_raises_in_call_and_teardown(rank: int) -> None:
    if rank == 0:
        raise ValueError("in call")


# Processes that end.


def test_os_exit_0(rank: int) -> None:
    if rank == 1:
        os._exit(0)
    all_reduce()


def test_os_exit_3(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    all_reduce()


def test_all_ranks_exit() -> None:
    os._exit(0)


def test_sigkill(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce()


def test_segfault(rank: int) -> None:
    if rank == 1:
        ctypes.string_at(0)
    all_reduce()


@pytest.mark.usefixtures("note_of_teardown")
def test_becomes_another_program(rank: int) -> None:
    if rank == 1:
        os.execv("/bin/true", ["true"])


@pytest.mark.usefixtures("note_of_teardown")
def test_exits_between_phases(rank: int) -> None:
    if rank == 1:
        threading.Thread(target=exit_between_phases, daemon=True).start()


def exit_between_phases() -> None:
    """Wait until the controller has all ranks' verdicts, and idles."""
    while not Path("between-phases").exists():
        time.sleep(0.001)
    os._exit(3)


def test_exits_with_code_3_after_its_verdict(rank: int) -> None:
    if rank == 1:
        really_exit = os._exit
        os._exit = lambda code: really_exit(3)


def test_dies_after_its_verdict(rank: int) -> None:
    if rank == 1:
        os._exit = lambda code: os.kill(os.getpid(), signal.SIGKILL)


# Processes that multiply.


def test_goes_on_in_a_child(rank: int) -> None:
    if rank == 1 and os.fork():
        os._exit(0)


def test_child_that_returns(rank: int) -> None:
    if rank == 1:
        child = os.fork()
        assert child != 0, "a child is no rank: nobody hears this"
        os.waitpid(child, 0)


def test_leaks_a_thread(rank: int) -> None:
    if rank == 1:
        threading.Thread(target=time.sleep, args=(FOREVER_S,)).start()


def leak_sleep(**kwargs: object) -> None:
    """Start `sleep`, with the session's token among its digits, and forget it."""
    command = ["/bin/sleep", f"{FOREVER_S}.{os.environ['SESSION_TOKEN']}"]
    process = subprocess.Popen(command, start_new_session=True, **kwargs)  # type: ignore[call-overload]  # env= only
    while not Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"/bin/sleep"):
        time.sleep(0.001)  # it is not yet another program
    process.returncode = 0  # no warning of a child that still runs


def test_leaks_a_grandchild(rank: int) -> None:
    if rank == 1:
        leak_sleep()


def test_leaks_a_daemon(rank: int) -> None:
    if rank == 1:
        child = os.fork()
        if child == 0:
            os.setsid()
            leak_sleep()
            os._exit(0)
        os.waitpid(child, 0)


def test_leaks_a_process_without_environment(rank: int) -> None:
    if rank == 1:
        leak_sleep(env={})


def test_leaks_a_process_and_fails(rank: int) -> None:
    if rank == 1:
        leak_sleep()
        raise ValueError("boom")


# Output and the report socket.


def test_prints_without_end(rank: int) -> None:
    while rank == 1:
        print("x" * 100_000)


def test_closes_its_report_socket(rank: int) -> None:
    if rank == 1:
        one = current()
        assert one is not None
        one.channel._socket.close()
        time.sleep(FOREVER_S)


def test_writes_nonsense_to_its_report_socket(rank: int) -> None:
    if rank == 1:
        one = current()
        assert one is not None
        one.channel._socket.sendall(b"\0\0\0\2\0\0\0\0{}")
        time.sleep(FOREVER_S)


# The world's meetings.


def test_barrier_that_a_rank_leaves_out(world: RankWorld, rank: int) -> None:
    if rank:
        world.barrier()


def test_barrier_that_a_rank_dies_before(world: RankWorld, rank: int) -> None:
    if rank == 0:
        os._exit(0)
    world.barrier()


def test_mismatched_meetings(world: RankWorld, rank: int) -> None:
    if rank == 0:
        world.barrier()
    else:
        world.gather(1)


def test_passes_in_the_end(world: RankWorld, rank: int) -> None:
    all_reduce()
    assert world.gather(rank) == [0, 1, 2, 3]
