"""A run of several ranks: all take the same step. It goes on with another number of ranks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint import CheckpointManager

FULL = torch.arange(24.0).reshape(12, 2)


def state_of(step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(FULL * step, mesh, [Shard(0)]), "step": step}


def full(state: dict[str, Any]) -> torch.Tensor:
    tensor = state["w"]
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def train(root: Path, *steps: int) -> list[int]:
    """Goes on from the newest step, and saves these."""
    state = state_of(0)
    with CheckpointManager(root, keep_last=2) as manager:
        loaded = manager.load_latest(state)
        if loaded is not None:
            assert torch.equal(full(state), FULL * loaded.number)
            assert state["step"] == loaded.number
        for step in steps:
            manager.save(step, state_of(step), metrics={"loss": 1 / step})
        return [step.number for step in manager.steps()]


def test_a_run_goes_on_with_another_number_of_ranks(worlds: Any, tmp_path: Path) -> None:
    root = tmp_path / "run"
    for size, steps, kept in [(2, (1, 2), [1, 2]), (3, (3,), [2, 3]), (1, (4,), [3, 4])]:
        with worlds(size) as world:
            assert world.run(train, root, *steps) == [kept] * size


@pytest.mark.world_size(2, isolation="module")
class TestTwoRanks:
    def test_all_ranks_pass_over_a_damaged_step(self, checkpoint_dir: Path, rank: int) -> None:
        manager = CheckpointManager(checkpoint_dir)
        for step in (1, 2):
            manager.save(step, state_of(step))
        if rank == 0:  # of rank 1's data, which only that rank reads
            path = next((checkpoint_dir / "step-00000002").glob("__1_*.distcp"))
            data = bytearray(path.read_bytes())
            data[len(data) // 4 :] = bytes(len(data) - len(data) // 4)
            path.write_bytes(data)
        dist.barrier()
        state = state_of(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = manager.load_latest(state)
        texts = [str(one.message) for one in caught]
        assert [("step 2 in" in text, "passed over" in text) for text in texts] == [
            (True, True) for _ in range(1 - rank)
        ]
        assert loaded is not None
        assert loaded.number == 1
        assert torch.equal(full(state), FULL)
        latest = manager.latest()
        assert latest is not None
        assert latest.number == 1

    def test_a_refusal_is_the_same_on_all_ranks(self, checkpoint_dir: Path) -> None:
        manager = CheckpointManager(checkpoint_dir)
        manager.save(5, state_of(5))
        with pytest.raises(dcp.CheckpointExistsError, match="step 4 cannot be saved after step 5"):
            manager.save(4, state_of(4))

    @pytest.mark.parametrize("wrong_rank", [0, 1])
    def test_a_wrong_argument_of_one_rank_is_an_error_on_all(
        self, checkpoint_dir: Path, rank: int, wrong_rank: int
    ) -> None:
        manager = CheckpointManager(checkpoint_dir)
        metrics: Any = {"loss": "low" if rank == wrong_rank else 0.5}
        with pytest.raises(dcp.CheckpointException, match=f"rank {wrong_rank}.*got loss='low'"):
            manager.save(1, state_of(1), metrics=metrics)
        manager.save(1, state_of(1), metrics={"loss": 0.5})
        assert [step.number for step in manager.steps()] == [1]

    def test_background_saves_run_one_after_another(self, checkpoint_dir: Path) -> None:
        manager = CheckpointManager(checkpoint_dir, keep_last=1)
        for step in (1, 2, 3):
            manager.async_save(step, state_of(step))
        manager.close()
        assert [step.number for step in manager.steps()] == [3]

    def test_only_the_coordinator_decides(self, checkpoint_dir: Path, rank: int) -> None:
        """Rank 1 cannot see the newest step, as with a listing that is out of date."""
        manager = CheckpointManager(checkpoint_dir)
        manager.save(1, state_of(1))
        manager.save(2, state_of(2))
        if rank == 1:
            manager._run.steps.folders.numbers = lambda: [1]  # type: ignore[method-assign]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latest = manager.latest()
        assert latest is not None
        assert latest.number == 2
