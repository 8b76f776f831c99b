"""The error of a failed save or load can be caught by its cause's class, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.errors import CheckpointError, CheckpointMismatchError
from support.states import EXISTING, without_warnings


class Full(dcp.FileSystemWriter):
    """Has no room on rank 1."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        if self.rank == 1:
            raise OSError(28, "No space left on device", "/data/x")
        return super().write_data(plan, planner)


def caught(operation: Any) -> Exception:
    """The error that it raises."""
    try:
        operation()
    except Exception as error:  # noqa: BLE001 - that this catches it is the test
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.world_size(2)
def test_a_failure_is_caught_by_the_class_of_its_cause(rank: int, checkpoint_dir: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=checkpoint_dir)
    wrong = {"w": torch.ones(2)} | ({"gone": torch.ones(1)} if rank == 1 else {})
    mismatch = caught(lambda: dcp.load(wrong, checkpoint_id=checkpoint_dir))
    assert isinstance(mismatch, CheckpointMismatchError)
    assert isinstance(mismatch, CheckpointException)
    assert mismatch.missing == ("gone",)
    assert list(mismatch.failures) == [1]
    with without_warnings(EXISTING):
        full = caught(lambda: dcp.save({"w": torch.ones(2)}, storage_writer=Full(checkpoint_dir)))
    assert isinstance(full, OSError)
    assert (full.errno, full.filename) == (28, "/data/x")
    assert isinstance(full, CheckpointException)
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        dcp.load({}, checkpoint_id=checkpoint_dir / "nowhere")


@pytest.mark.world_size(2)
def test_a_future_holds_an_exception(rank: int, checkpoint_dir: Path) -> None:
    started: Any = dcp.async_save({"w": torch.ones(2)}, storage_writer=Full(checkpoint_dir))
    with pytest.raises(OSError, match="No space left on device"):
        started.result(60)
