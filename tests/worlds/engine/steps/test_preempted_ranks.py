"""Signals to stop in a world: to one rank, to all, twice, while a save runs, on slow storage."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pytest_dcp.checkpoint import CheckpointManager, SaveAbandonedError
from pytest_dcp.faults import FaultyStorage, Slow

SIZES = [2, 4]
LAST = 12


def state_of(step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(48.0).reshape(24, 2) * step
    return {"w": distribute_tensor(full, mesh, [Shard(0)]), "step": step}


def train(
    manager: CheckpointManager, signals: dict[int, tuple[int, ...]], *, in_background: bool
) -> tuple[int, bool]:
    """The loop of the guide; returns the last step, and whether a signal ended it.

    signals: by step, the ranks that get SIGTERM in it.
    """
    with manager:
        for step in range(1, LAST + 1):
            if dist.get_rank() in signals.get(step, ()):
                os.kill(os.getpid(), signal.SIGTERM)
            stopping = manager.should_stop()
            if stopping or step % 3 == 0:
                (manager.async_save if in_background else manager.save)(step, state_of(step))
            if stopping:
                break
    return step, stopping


def assert_goes_on_from(folder: Path, step: int) -> None:
    state = state_of(0)
    loaded = CheckpointManager(folder).load_latest(state)
    assert loaded is not None
    assert loaded.number == state["step"] == step
    assert torch.equal(state["w"].full_tensor(), state_of(step)["w"].full_tensor())


@pytest.mark.world_size(SIZES, isolation="module")
@pytest.mark.parametrize("in_background", [False, True])
class TestSignals:
    def test_to_one_rank_stops_all(self, checkpoint_dir: Path, in_background: bool) -> None:
        manager = CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM)
        ended = train(manager, {5: (dist.get_world_size() - 1,)}, in_background=in_background)
        assert ended == (5, True)
        assert_goes_on_from(checkpoint_dir, 5)

    def test_to_all_ranks(self, checkpoint_dir: Path, in_background: bool) -> None:
        manager = CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM)
        ended = train(manager, {7: (0, 1, 2, 3)}, in_background=in_background)
        assert ended == (7, True)
        assert_goes_on_from(checkpoint_dir, 7)

    def test_to_none_ends_at_the_last_step(self, checkpoint_dir: Path, in_background: bool) -> None:
        manager = CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM)
        assert train(manager, {}, in_background=in_background) == (LAST, False)
        assert_goes_on_from(checkpoint_dir, LAST)


@pytest.mark.world_size(SIZES, isolation="module")
class TestAgreement:
    def test_any_collective_call_shows_the_signal_to_all_ranks(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        with CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM) as manager:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert not manager.is_preempted
            manager.save(1, state_of(1))
            assert manager.is_preempted

    def test_a_second_signal_elsewhere_changes_nothing(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        with CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM, grace_s=500.0) as manager:
            for sender in (0, 1, 1):
                if rank == sender:
                    os.kill(os.getpid(), signal.SIGTERM)
                assert manager.should_stop()
            manager.save(1, state_of(1))
        assert_goes_on_from(checkpoint_dir, 1)

    def test_the_answer_does_not_wait_for_a_running_save(
        self, checkpoint_dir: Path, faulty_storage: FaultyStorage, rank: int
    ) -> None:
        manager = CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM)
        faulty_storage.inject(Slow(0.5), on="write", path="*.distcp")
        manager.async_save(1, state_of(1))
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        asked_s = time.monotonic()
        assert manager.should_stop()
        status = manager.running_save
        if time.monotonic() - asked_s < 0.1:  # on a busy machine it may have ended
            assert status is not None
            assert status.phase in ("plan", "write")
        manager.close()
        assert_goes_on_from(checkpoint_dir, 1)


@pytest.mark.world_size(SIZES)
@pytest.mark.parametrize("to_all", [False, True])
def test_on_slow_storage_the_save_is_given_up_on_all_ranks(
    checkpoint_dir: Path, faulty_storage: FaultyStorage, rank: int, to_all: bool
) -> None:
    """The storage is slow on the last rank, and rank 0 gets the signal."""
    manager = CheckpointManager(checkpoint_dir, on_signal=signal.SIGTERM, grace_s=1.0)
    manager.save(1, state_of(1))
    last = dist.get_world_size() - 1
    faulty_storage.inject(
        Slow(1.5), on="write", path="*step-00000002/*.distcp", rank=last, sticky=True
    )
    manager.async_save(2, state_of(2))
    if rank == 0 or to_all:
        os.kill(os.getpid(), signal.SIGTERM)
    assert manager.should_stop()
    with pytest.raises(SaveAbandonedError, match="save of step 2 was given up"):
        manager.close()
    dist.barrier()
    if rank == 0:
        wait_until_cleaned(checkpoint_dir / "step-00000002")
    dist.barrier()
    if rank == 0:
        with pytest.warns(UserWarning, match="step 2 in .* is not whole"):
            assert_goes_on_from(checkpoint_dir, 1)
    else:
        assert_goes_on_from(checkpoint_dir, 1)


def wait_until_cleaned(folder: Path) -> None:
    """A rank that writes sees that it must stop when the write returns."""
    until_s = time.monotonic() + 60.0
    while [path.name for path in folder.iterdir()] != ["step.json"]:
        assert time.monotonic() < until_s, list(folder.iterdir())
        time.sleep(0.05)
