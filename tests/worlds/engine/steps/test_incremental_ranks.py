"""Incremental steps of several ranks: each shares its own shards, another world begins in full."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pytest_dcp._engine.steps import incremental_writer
from pytest_dcp._engine.steps.earlier_blocks import EarlierStep
from pytest_dcp.checkpoint import CheckpointManager, load

FROZEN = torch.arange(48_000.0).reshape(4800, 10)
MOVING = torch.arange(48.0).reshape(24, 2)


def state_of(step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "frozen": distribute_tensor(FROZEN, mesh, [Shard(0)]),
        "copied": distribute_tensor(FROZEN * 2, mesh, [Replicate()]),
        "moving": distribute_tensor(MOVING * step, mesh, [Shard(0)]),
        "step": step,
    }


def assert_holds(folder: Path, step: int) -> None:
    """Collective."""
    state = state_of(0)
    state["frozen"] = state["frozen"] * 0
    load(state, checkpoint_id=folder)
    for name, expected in (("frozen", FROZEN), ("copied", FROZEN * 2), ("moving", MOVING * step)):
        tensor = state[name]
        assert isinstance(tensor, DTensor)
        assert torch.equal(tensor.full_tensor(), expected), name
    assert state["step"] == step


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def data_files(root: Path, step: int) -> set[str]:
    return {path.name for path in folder_of(root, step).glob("*.distcp")}


def ranks_that_share(root: Path, earlier: int, later: int) -> set[int]:
    """Ranks of which the later step has a data file of the earlier one."""
    names = data_files(root, earlier) & data_files(root, later)
    return {int(name[2 : name.index("_", 2)]) for name in names}


def save_and_compare(root: Path, *steps: int) -> None:
    with CheckpointManager(root, incremental=True) as manager:
        for step in steps:
            manager.save(step, state_of(step))
            assert_holds(folder_of(root, step), step)


def remove_and_compare(root: Path, removed: int, *others: int) -> None:
    if dist.get_rank() == 0:
        CheckpointManager(root, no_dist=True)._run.steps.remove(removed)
    dist.barrier()
    for step in others:
        assert_holds(folder_of(root, step), step)


def test_each_rank_shares_its_shards_until_the_number_of_ranks_changes(
    worlds: Any, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    with worlds(4) as world:
        world.run(save_and_compare, root, 1, 2)
    assert ranks_that_share(root, 1, 2) == {0, 1, 2, 3}
    with worlds(2) as world:
        world.run(save_and_compare, root, 3, 4)
        # The replicated tensor is one chunk in either world.
        assert len(ranks_that_share(root, 2, 3)) <= 1
        assert ranks_that_share(root, 3, 4) == {0, 1}
        world.run(remove_and_compare, root, 3, 1, 2, 4)
        world.run(remove_and_compare, root, 1, 2, 4)


@pytest.mark.world_size(2, isolation="module")
class TestTwoRanks:
    def test_background_saves_share(self, checkpoint_dir: Path) -> None:
        with CheckpointManager(checkpoint_dir, incremental=True, keep_last=2) as manager:
            for step in (1, 2, 3):
                manager.async_save(step, state_of(step))
        assert ranks_that_share(checkpoint_dir, 2, 3) == {0, 1}
        assert_holds(folder_of(checkpoint_dir, 3), 3)

    def test_a_rank_that_does_not_see_the_earlier_step_writes_in_full(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manager = CheckpointManager(checkpoint_dir, incremental=True)
        manager.save(1, state_of(1))
        if rank == 1:
            monkeypatch.setattr(EarlierStep, "read_index", lambda self: None)
        manager.save(2, state_of(2))
        assert ranks_that_share(checkpoint_dir, 1, 2) == {0}
        assert_holds(folder_of(checkpoint_dir, 2), 2)
        manager.close()

    def test_a_rank_without_the_hash_of_the_others_warns_and_writes_in_full(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if rank == 1:
            monkeypatch.setattr(incremental_writer, "HASH_MAKERS", {})
        manager = CheckpointManager(checkpoint_dir, incremental=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in (1, 2):
                manager.save(step, state_of(step))
        assert [str(one.message)[:10] for one in caught] == ["this rank's"[:10]] * (2 * rank)
        assert ranks_that_share(checkpoint_dir, 1, 2) == {0}
        assert_holds(folder_of(checkpoint_dir, 2), 2)
        manager.close()

    def test_one_rank_exports(self, checkpoint_dir: Path) -> None:
        manager = CheckpointManager(checkpoint_dir / "run", incremental=True)
        for step in (1, 2):
            manager.save(step, state_of(step))
        reports = manager.export(2, checkpoint_dir / "exported")
        assert reports.files == len(data_files(checkpoint_dir / "run", 2))
        assert_holds(checkpoint_dir / "exported", 2)
        manager.close()
