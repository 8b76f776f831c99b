"""Copied as test_exits.py: work that is left to the exit of a rank."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import logging.handlers
import multiprocessing
import os
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory
from pathlib import Path

import pytest
from session_recorder import note

FOREVER_S = 600.0
libc = ctypes.CDLL(None)
libc.puts(b"printed by C at collection")
kept: list[object] = []
"""Objects that live until their process exits."""


class Owner:
    """Something that a finalizer can belong to."""


def leave(what: str) -> None:
    note("left", what=what, pid=os.getpid())


atexit.register(leave, "atexit of the module")
of_module = Owner()
weakref.finalize(of_module, leave, "finalizer of the module")
note("imported", pid=os.getpid())


@pytest.fixture(autouse=True)
def noted_pid() -> None:
    note("ran", pid=os.getpid())


@pytest.mark.world_size(2)
class TestExits:
    def test_atexit(self, rank: int) -> None:
        atexit.register(leave, "atexit")
        atexit.register(print, "printed at the exit of", rank)

    def test_output_of_c(self) -> None:
        atexit.register(libc.puts, b"printed by C at the exit")
        libc.puts(b"printed by C in the test")

    def test_finalizer(self) -> None:
        kept.append(Owner())
        weakref.finalize(kept[-1], leave, "finalizer")

    def test_folder(self) -> None:
        folder = tempfile.TemporaryDirectory()
        Path(folder.name, "x").touch()
        kept.append(folder)
        note("folder", path=folder.name)

    def test_shared_memory(self) -> None:
        kept.append(memory := shared_memory.SharedMemory(create=True, size=64))
        note("memory", path=f"/dev/shm/{memory.name.lstrip('/')}")

    def test_shared_memory_of_a_killed_rank(self, rank: int) -> None:
        self.test_shared_memory()
        if rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(FOREVER_S)

    def test_log_handler(self, tmp_path: Path) -> None:
        file = logging.FileHandler(tmp_path / "log")
        memory = logging.handlers.MemoryHandler(99, target=file)
        memory.handle(logging.makeLogRecord({"msg": "kept in memory", "levelno": 20}))
        kept.append(memory)
        note("log", path=str(tmp_path / "log"))

    def test_executor_that_is_idle(self) -> None:
        kept.append(executor := ThreadPoolExecutor(1))
        executor.submit(int).result()

    def test_thread_that_ends_soon(self) -> None:
        def end() -> None:
            time.sleep(0.2)
            leave("thread")

        threading.Thread(target=end).start()

    def test_survivor_of_a_death(self, rank: int) -> None:
        atexit.register(leave, "survivor")
        if rank == 1:
            os._exit(0)

    def test_failure(self, rank: int) -> None:
        atexit.register(leave, "failure")
        raise ValueError("boom")


@pytest.mark.world_size(2)
class TestErrors:
    def test_atexit(self, rank: int) -> None:
        def fail_at_exit() -> None:
            raise KeyError("at exit")

        if rank == 1:
            atexit.register(fail_at_exit)

    def test_finalizer(self) -> None:
        kept.append(Owner())
        weakref.finalize(kept[-1], int, "no number")

    def test_cycle(self) -> None:
        class Cyclic:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                raise ValueError("in a cycle")

        gc.disable()
        Cyclic()

    def test_thread_that_goes_on(self, rank: int) -> None:
        if rank == 1:
            threading.Thread(target=time.sleep, args=(FOREVER_S,), name="sleeper").start()

    def test_worker_that_hangs(self) -> None:
        kept.append(executor := ThreadPoolExecutor(1, thread_name_prefix="worker"))
        executor.submit(time.sleep, FOREVER_S)

    def test_child_that_goes_on(self, rank: int) -> None:
        context = multiprocessing.get_context("fork")
        if rank == 0:
            for daemon in (True, False):
                child = context.Process(target=time.sleep, args=(FOREVER_S,), daemon=daemon)
                child.start()
                kept.append(child)

    def test_exit_code(self, rank: int) -> None:
        if rank == 1:
            atexit.register(os._exit, 3)

    def test_end_of_process_by_a_handler(self, rank: int) -> None:
        if rank == 1:
            atexit.register(os._exit, 0)

    def test_end_of_process_by_a_thread(self, rank: int) -> None:
        def end() -> None:
            time.sleep(0.5)
            os._exit(0)

        if rank == 1:
            threading.Thread(target=end).start()

    def test_exit_goes_on_in_a_child(self, rank: int) -> None:
        def turn_into_a_daemon() -> None:
            if os.fork():
                os._exit(0)

        if rank == 1:
            atexit.register(turn_into_a_daemon)

    def test_child_that_is_forked_at_exit(self, rank: int) -> None:
        if rank == 1:
            atexit.register(os.fork)

    def test_signal_at_exit(self, rank: int) -> None:
        if rank == 1:
            atexit.register(os.kill, os.getpid(), 11)


@pytest.mark.world_size(2, isolation="module")
class TestWarm:
    def test_first(self) -> None:
        atexit.register(leave, "warm")

    def test_second(self) -> None:
        pass


@pytest.mark.world_size(3, isolation="module")
class TestWarmEnd:
    def test_end_of_process_by_a_handler(self, rank: int) -> None:
        if rank == 1:
            atexit.register(os._exit, 0)


def fail_at_exit() -> None:
    def fail() -> None:
        raise KeyError("in a function's world")

    atexit.register(fail)
    atexit.register(print, "printed at exit")


def test_functions(worlds: object) -> None:
    with worlds(2) as w:  # type: ignore[operator]  # the fixture
        w.run(fail_at_exit)
