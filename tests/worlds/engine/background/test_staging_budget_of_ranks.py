"""Ranks that wait in `async_save` for what did not fit into their staging budgets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import pytest_dcp.checkpoint as dcp
from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.checkpoint.api import CheckpointException

DEADLINE_S = 120
KIB = 1024


def state(n: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(4.0 * KIB).reshape(64, 64) + n
    return {
        "shard": distribute_tensor(full, mesh, [Shard(0)]),
        "replicate": distribute_tensor(full, mesh, [Replicate()]),
        "plain": full[0].clone(),
        "step": n,
    }


def spoil(state_dict: dict[str, Any]) -> None:
    for value in state_dict.values():
        if isinstance(value, DTensor):
            value.to_local().fill_(-1)
        elif isinstance(value, torch.Tensor):
            value.fill_(-1)


def assert_loads(folder: Path, n: float) -> None:
    target, expected = state(0.0), state(n)
    dcp.load(target, checkpoint_id=folder)
    for name, value in expected.items():
        if isinstance(value, DTensor):
            assert torch.equal(target[name].to_local(), value.to_local()), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(target[name], value), name
        else:
            assert target[name] == value


@pytest.mark.world_size(2)
@pytest.mark.parametrize("use_collectives", [True, False])
@pytest.mark.parametrize("budgets", [(0, 0), (0, 1 << 20), (12 * KIB, 20 * KIB)])
def test_several_saves_under_way_have_the_values_at_their_calls(
    rank: int, checkpoint_dir: Path, budgets: tuple[int, int], use_collectives: bool
) -> None:
    futures: list[Any] = []
    for n in range(3):
        training = state(float(n))
        futures.append(
            dcp.async_save(
                training,
                checkpoint_id=checkpoint_dir / str(n),
                use_collectives=use_collectives,
                staging_budget=budgets[rank],
            )
        )
        spoil(training)
    for n, future in enumerate(futures):
        future.result(DEADLINE_S)
        assert_loads(checkpoint_dir / str(n), float(n))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("budgets", [(0, 0), (1 << 20, 0)])
def test_replicas_that_differ_are_named_though_they_may_have_changed(
    world: RankWorld, rank: int, checkpoint_dir: Path, budgets: tuple[int, int]
) -> None:
    training = {"w": torch.full((KIB,), float(rank)), "v": torch.ones(3)}
    future: Any = dcp.async_save(
        training, checkpoint_id=checkpoint_dir / "c", replicas="check", staging_budget=budgets[rank]
    )
    spoil(training)
    with pytest.raises(CheckpointException, match=r"1 key[^w]*and 'w'"):
        future.result(DEADLINE_S)


@pytest.mark.world_size(2)
def test_a_rank_that_fails_lets_the_others_go_on(rank: int, checkpoint_dir: Path) -> None:
    class Broken(dcp.FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            raise OSError("the disk is gone")

    kind = Broken if rank == 1 else dcp.FileSystemWriter
    future: Any = dcp.async_save(
        state(1.0), storage_writer=kind(checkpoint_dir / "c"), staging_budget=0
    )
    with pytest.raises(CheckpointException, match="the disk is gone"):
        future.result(DEADLINE_S)
