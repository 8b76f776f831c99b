"""Incremental saves that SIGKILL ends at random moments: the last saved step is there."""

from __future__ import annotations

import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from support.incremental_runs import assert_holds, bytes_on_disk, data_files, folder_of, incremental
from support.kills import Report, run_and_kill_after

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROUNDS = 20
LONGEST_S = 0.15
"""Of a round, after its first save: some saves, with their removals."""
FROZEN = torch.arange(20_000.0)


def state_of(step: int) -> dict[str, Any]:
    """Small enough that torch uses no threads, which a fork lacks."""
    return {"f": FROZEN, "w": torch.full((1000,), float(step)), "s": torch.full((9000,), step // 4)}


def save_until_killed(root: Path, report: Report) -> None:
    manager = incremental(root, keep_last=2)
    latest = manager.latest()
    for step in itertools.count(1 if latest is None else latest.number + 1):
        if step % 3:
            manager.save(step, state_of(step))
        else:
            manager.async_save(step, state_of(step))
            manager.wait()
        report(step)


def test_a_killed_save_never_costs_the_last_whole_step(tmp_path: Path) -> None:
    root = tmp_path / "run"
    moments = random.Random(7)
    for _ in range(ROUNDS):
        after_s = moments.uniform(0, LONGEST_S)
        ended = run_and_kill_after(lambda report: save_until_killed(root, report), after_s)
        assert ended.is_killed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = [step for step in incremental(root).steps() if step.is_whole]
        assert steps[-1].number >= ended.reports[-1]
        for step in steps:
            assert_holds(folder_of(root, step.number), state_of(step.number))
    manager = incremental(root, keep_last=1)
    last = steps[-1].number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager.save(last + 1, state_of(last + 1))
    assert len(data_files(root, last + 1)) <= 4
    live = sum(tensor.nbytes for tensor in state_of(0).values())
    assert bytes_on_disk(folder_of(root, last + 1)) < 2 * live + 50_000
