"""How many threads a reader starts for the bytes that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import read_copies
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.storages import folder_reader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CORES = 4


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of each read, on a rank of four cores, where 1,000 bytes pay for a thread."""
    seen: list[int] = []
    run_all = read_copies.run_all

    def noted(jobs: Any, threads: int) -> list[Any]:
        if jobs:
            seen.append(threads)
        return run_all(jobs, threads)

    monkeypatch.setattr(read_copies, "run_all", noted)
    monkeypatch.setattr(folder_reader, "reader_threads", lambda: CORES)
    monkeypatch.setattr(folder_reader, "BYTES_PER_THREAD", 1000)
    return seen


def load(folder: Path, elements: int, **options: Any) -> None:
    """Save and load a tensor of so many float32."""
    full = torch.arange(float(elements))
    dcp.save({"w": full}, checkpoint_id=folder)
    target = torch.zeros(elements)
    dcp.load({"w": target}, storage_reader=dcp.FileSystemReader(folder, **options))
    assert torch.equal(target, full)


@pytest.mark.parametrize(
    ("nbytes", "threads"), [(4, 1), (1996, 1), (2000, 2), (3996, 3), (40_000, CORES)]
)
def test_a_thread_must_pay_for_itself(
    tmp_path: Path, started: list[int], nbytes: int, threads: int
) -> None:
    """Few bytes are read by the caller's own thread."""
    load(tmp_path, nbytes // 4)
    assert started == [threads]


def test_an_open_checkpoint_reads_by_the_same_rule(tmp_path: Path, started: list[int]) -> None:
    """Its tensors are mostly small, too."""
    load(tmp_path, 1)
    with dcp.open(tmp_path) as found:
        assert found["w"].tensor() == 0
    assert started == [1, 1]


def test_a_chosen_number_is_kept(tmp_path: Path, started: list[int]) -> None:
    """The user may know a disk that is slow for one thread."""
    load(tmp_path, 1, thread_count=3)
    assert started == [3]


def test_over_a_network_all_threads_read(
    tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait more than they copy."""
    monkeypatch.setattr(LocalDisk, "is_remote", lambda self, folder: True)
    load(tmp_path, 1)
    assert started == [CORES]
