"""Executors and `_Checkpointer`, which libraries use by torch's private names."""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint._async_executor import _AsyncCheckpointExecutor
from pytest_dcp.checkpoint._async_process_executor import _ProcessBasedAsyncCheckpointExecutor
from pytest_dcp.checkpoint._async_thread_executor import (
    _ThreadBasedAsyncCheckpointExecutor,
    save_wrapper,
)
from pytest_dcp.checkpoint._checkpointer import _Checkpointer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

TORCH = "torch.distributed.checkpoint"
WAIT_S = 180.0
KINDS = [_ThreadBasedAsyncCheckpointExecutor, _ProcessBasedAsyncCheckpointExecutor]


class NeverCommits(dcp.FileSystemWriter):
    """Fails at its end."""

    def finish(self, metadata: Any, results: Any) -> None:
        raise OSError("the disk is full, says the test")


@pytest.mark.parametrize("kind", [*KINDS, _Checkpointer])
def test_it_passes_for_torchs_class_of_that_name(kind: type) -> None:
    home = {
        "_ThreadBasedAsyncCheckpointExecutor": "_async_thread_executor",
        "_ProcessBasedAsyncCheckpointExecutor": "_async_process_executor",
        "_Checkpointer": "_checkpointer",
    }[kind.__name__]
    theirs = getattr(importlib.import_module(f"{TORCH}.{home}"), kind.__name__)
    assert issubclass(kind, theirs)
    assert kind is not theirs


def test_executors_have_torchs_base() -> None:
    assert all(issubclass(kind, _AsyncCheckpointExecutor) for kind in KINDS)
    assert _AsyncCheckpointExecutor.__module__ == f"{TORCH}._async_executor"


@pytest.mark.parametrize("kind", KINDS)
def test_two_saves_of_one_executor_are_under_way_and_both_are_made(
    kind: Any, tmp_path: Path
) -> None:
    """The first waits for its staging; the second's future is there before."""
    executor = kind()
    staging: Future[dict[str, Any]] = Future()
    first = executor.execute_save(staging, checkpoint_id=tmp_path / "1", no_dist=True)
    second = executor.execute_save(
        {"w": torch.ones(2), "n": 2}, checkpoint_id=tmp_path / "2", no_dist=True
    )
    assert not first.done()
    staging.set_result({"w": torch.zeros(2), "n": 1})
    for n, future in enumerate((first, second), start=1):
        assert set(future.result(WAIT_S).state_dict_metadata) == {"w", "n"}
        loaded = dcp.load_without_template(checkpoint_id=tmp_path / str(n), no_dist=True)
        assert loaded["n"] == n
        assert torch.equal(loaded["w"], torch.full((2,), n - 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_staging_or_save_is_the_futures(kind: Any, tmp_path: Path) -> None:
    executor = kind()
    staging: Future[dict[str, Any]] = Future()
    staging.set_exception(RuntimeError("no room to stage"))
    unstaged = executor.execute_save(staging, checkpoint_id=tmp_path / "1", no_dist=True)
    unsaved = executor.execute_save(
        {"w": torch.ones(2)}, storage_writer=NeverCommits(tmp_path / "2"), no_dist=True
    )
    with pytest.raises(dcp.CheckpointException, match="no room to stage"):
        unstaged.result(WAIT_S)
    with pytest.raises(dcp.CheckpointException, match="the disk is full"):
        unsaved.result(WAIT_S)
    assert list(tmp_path.rglob("*.distcp")) == []
    after = executor.execute_save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "2", no_dist=True)
    assert after.result(WAIT_S) is not None


def test_saves_in_threads_leave_no_thread(tmp_path: Path) -> None:
    future = _ThreadBasedAsyncCheckpointExecutor().execute_save(
        {"w": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True
    )
    future.result(WAIT_S)
    for thread in threading.enumerate():
        if thread.name.startswith("dcp-async-save"):
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_staged_state_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    wrong: Any = [1, 2]
    with pytest.raises(TypeError, match="state_dict must be a mapping"):
        _ThreadBasedAsyncCheckpointExecutor().execute_save(
            wrong, checkpoint_id=tmp_path, no_dist=True
        )


def test_save_wrapper_waits_for_its_state_and_saves(tmp_path: Path) -> None:
    staging: Future[dict[str, Any]] = Future()
    staging.set_result({"n": 4})
    save_wrapper(staging, checkpoint_id=tmp_path, no_dist=True)
    assert dcp.load_without_template(checkpoint_id=tmp_path, no_dist=True) == {"n": 4}


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")
def test_a_checkpointer_saves_and_loads_with_its_storages(tmp_path: Path) -> None:
    checkpointer = _Checkpointer(dcp.FileSystemWriter(tmp_path), dcp.FileSystemReader(tmp_path))
    checkpointer.save({"w": torch.ones(3)})
    state = {"w": torch.zeros(3)}
    checkpointer.load(state)
    assert torch.equal(state["w"], torch.ones(3))
    checkpointer.async_save({"w": torch.full((3,), 2.0)}).result(WAIT_S)
    checkpointer.load(state)
    assert torch.equal(state["w"], torch.full((3,), 2.0))


def test_a_checkpointer_uses_its_planners(tmp_path: Path) -> None:
    checkpointer = _Checkpointer(
        dcp.FileSystemWriter(tmp_path),
        dcp.FileSystemReader(tmp_path),
        no_dist=True,
        load_planner=dcp.DefaultLoadPlanner(allow_partial_load=True),
        save_planner=dcp.DefaultSavePlanner(),
    )
    checkpointer.save({"w": torch.ones(3)})
    state = {"w": torch.zeros(3), "more": torch.zeros(1)}
    checkpointer.load(state)
    assert torch.equal(state["w"], torch.ones(3))
