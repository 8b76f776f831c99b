"""Copied as test_one_suite.py: the same bodies in marked tests, and in functions for `mp.spawn`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from session_recorder import note

BACKEND: Any = os.environ.get("ONE_SUITE_BACKEND", "auto")
SIZE = 2


def gathers(rank: int) -> None:
    parts = [torch.empty(2) for _ in range(SIZE)]
    dist.all_gather(parts, torch.ones(2))
    assert len(parts) == dist.get_world_size() == SIZE
    assert dist.get_rank() == rank
    note("backend", name=dist.get_backend())


def fails(rank: int) -> None:
    assert rank != 0, "rank 0 refuses"


def raises(rank: int) -> None:
    raise ValueError("boom")


def skips(rank: int) -> None:
    pytest.skip("for a reason")


def fails_as_expected(rank: int) -> None:
    assert 1 // 0


BODIES = [
    gathers,
    fails,
    raises,
    skips,
    pytest.param(fails_as_expected, marks=pytest.mark.xfail(strict=True)),
]


@pytest.mark.world_size(SIZE, backend=BACKEND)
@pytest.mark.parametrize("body", BODIES)
def test_marked(body: Callable[[int], None], rank: int) -> None:
    body(rank)


def run_in_group(rank: int, body: Callable[[int], None], port: int) -> None:
    where = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=SIZE)
    try:
        body(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("body", BODIES)
def test_unmodified(body: Callable[[int], None]) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(run_in_group, (body, port), nprocs=SIZE)  # type: ignore[no-untyped-call]
