"""Copied as test_reports.py: tests whose reports are looked at closely."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = pytest.mark.world_size(4, timeout=30)


def loss_of(rank: int) -> int:
    return 7 if rank == 2 else 0


def test_cause_and_waiting_peers(rank: int) -> None:
    assert loss_of(rank) == 0, f"loss on {rank}"
    dist.all_reduce(torch.ones(1))


def test_cause_and_later_failure(rank: int, checkpoint_dir: Path) -> None:
    """Rank 1 fails, then rank 3 in another way; every rank prints."""
    print("printed by", rank)
    flag = checkpoint_dir / "rank 1 failed"
    if rank == 1:
        flag.touch()
        raise ValueError("the cause")
    if rank == 3:
        while not flag.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        raise KeyError("later")


def test_long_assertion(rank: int) -> None:
    """Of which a heading shows the first line only, though ranks differ in others."""
    assert {"rank": rank, "a": 1} == {"rank": 9, "a": 1}, f"first line\nof rank {rank}"


def test_text_that_leads_in(rank: int) -> None:
    raise RuntimeError("Error(s) in loading:\n\tMissing key(s): a\n\tUnexpected key(s): b")


def test_all_fail_alike() -> None:
    numbers = [1, 2]
    assert len(numbers) == 3


def test_output_of_every_kind(rank: int) -> None:
    print("stdout of", rank)
    print("stderr of all", file=sys.stderr)
    logging.getLogger("of_all").warning("logged by all")
    if rank == 0:
        raise ValueError("boom")


def test_caplog(rank: int, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("own").warning("logged by %d", rank)
    assert caplog.messages == [f"logged by {rank}"]


@pytest.fixture
def chatty() -> Iterator[None]:
    print("printed in setup")
    yield
    print("printed in teardown")


@pytest.mark.usefixtures("chatty")
def test_output_of_fixtures(rank: int) -> None:
    assert rank != 1


def test_last_words(rank: int) -> None:
    print("last words of", rank)
    if rank == 1:
        os._exit(0)


@pytest.mark.world_size(4, timeout=2)
def test_hang(world: RankWorld, rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))
    elif rank == 1:
        dist.barrier()
    elif rank == 2:
        time.sleep(600)
    else:
        world.barrier()


def test_slow(rank: int) -> None:
    if rank == 3:
        time.sleep(0.5)


def test_warns() -> None:
    warnings.warn("told by all ranks", UserWarning, stacklevel=1)


def test_properties(rank: int, record_property: Callable[[str, object], None]) -> None:
    record_property("same", "on all")
    record_property("own", rank)


def test_subtests(subtests: pytest.Subtests, rank: int) -> None:
    for i in range(3):
        with subtests.test("sub", i=i):
            assert not (rank in (1, 2) and i == 2)
