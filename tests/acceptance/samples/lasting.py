"""Copied as test_lasting.py: a world that lasts until somebody ends it, with children."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from session_recorder import note

FOREVER_S = 600
SLEEP = ("/bin/sleep", str(FOREVER_S))


def start_children() -> None:
    """In this process group, in a session of its own, and the same without another program."""
    subprocess.Popen(SLEEP)
    subprocess.Popen(SLEEP, start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        time.sleep(FOREVER_S)
        os._exit(0)


def test_before() -> None:
    note("controller", pid=os.getpid())


@pytest.mark.world_size(2, timeout=FOREVER_S)
def test_lasts(rank: int) -> None:
    start_children()
    note("lasting", rank=rank, pid=os.getpid(), parent=os.getppid())
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(FOREVER_S)


@pytest.mark.world_size(1)
def test_after() -> None:
    pass


def test_ordinary_after() -> None:
    pass
