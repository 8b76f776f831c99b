"""Copied as test_injections.py: injections that do their part, and some that do not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pytest_dcp.faults import FaultyStorage, Hang, InputOutput, NoSpace


def test_alone_never_fires(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(), on="write")


@pytest.mark.world_size(2)
def test_in_a_world_never_fires(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(), on="write", rank=1)


@pytest.mark.world_size(2)
def test_in_one_rank_fires(faulty_storage: FaultyStorage, checkpoint_dir: Path, rank: int) -> None:
    faulty_storage.inject(InputOutput(), on="create", rank=1)
    if rank == 1:
        with pytest.raises(OSError, match="Input/output"):
            (checkpoint_dir / "x").touch()


def test_alone_is_not_to_fire(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(), on="write", must_fire=False)


def test_alone_fails_by_itself(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(), on="write")
    raise ValueError("boom")


@pytest.mark.world_size(2)
def test_in_a_world_fails_by_itself(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(), on="write")
    raise ValueError("boom")


def test_hangs_to_the_end(faulty_storage: FaultyStorage, checkpoint_dir: Path) -> None:
    hung = faulty_storage.inject(Hang(), on="create")
    threading.Thread(target=(checkpoint_dir / "x").touch, name="hung").start()
    hung.wait_until_fired()


def test_nothing_hangs_any_more(tmp_path: Path) -> None:
    for thread in threading.enumerate():
        if thread.name == "hung":
            thread.join(20)
            assert not thread.is_alive()
    assert open.__module__ in ("io", "_io")
