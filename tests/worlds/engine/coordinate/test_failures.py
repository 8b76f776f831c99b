"""Failures of a storage's hooks: on whichever ranks, every rank learns which failed, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from support.states import DISABLED, numbered, spread, torch_dcp
from support.storages import FaultyReader, FaultyWriter, FolderReader, FolderWriter

SAVE_EVERY = ("set_up_storage_writer", "prepare_local_plan", "write_data", "write_data_later")
SAVE_COORDINATOR = ("prepare_global_plan", "finish")
LOAD_EVERY = (
    "read_metadata",
    "set_up_storage_reader",
    "prepare_local_plan",
    "read_data",
    "read_data_later",
)
LOAD_COORDINATOR = ("prepare_global_plan",)


def state(mesh: DeviceMesh, fill: float = 1) -> dict[str, Any]:
    full = numbered(6, 3) * fill
    return {"plain": full, "sharded": spread(full, mesh, Shard(0)), "value": [1, 2]}


def named(error: CheckpointException) -> dict[int, str]:
    return {
        rank: f"{type(failure).__name__}: {failure}"
        for rank, (failure, _) in error.failures.items()
    }


def expected(hook: str, ranks: Sequence[int]) -> dict[int, str]:
    return {rank: f"ValueError: {hook} fails on rank {rank}" for rank in ranks}


@pytest.mark.world_size(4, isolation="module")
class TestTogether:
    @pytest.mark.parametrize("hook", SAVE_EVERY)
    def test_a_save_that_fails_on_some_ranks(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, hook: str
    ) -> None:
        for ranks in ((0,), (1, 3), (0, 1, 2, 3)):
            writer = FaultyWriter(checkpoint_dir, {hook: ranks})
            with pytest.raises(CheckpointException) as caught:
                dcp.save(state(device_mesh), storage_writer=writer)
            assert named(caught.value) == expected(hook, ranks)
            assert str(ranks[0]) in str(caught.value).partition("\n")[0]
            assert not (checkpoint_dir / "index").exists()

    @pytest.mark.parametrize("hook", SAVE_COORDINATOR)
    def test_a_save_that_fails_on_the_coordinator(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, hook: str
    ) -> None:
        for coordinator in (0, 1):
            fails = {hook: [0, 1, 2, 3]}
            with (
                pytest.raises(CheckpointException) as caught,
                pytest.warns(FutureWarning, match="save_state_dict"),
            ):
                dcp.save_state_dict(
                    state(device_mesh),
                    FaultyWriter(checkpoint_dir, fails),
                    coordinator_rank=coordinator,
                )
            assert named(caught.value) == expected(hook, [coordinator])
        writer = FaultyWriter(checkpoint_dir, {hook: [1, 2, 3]})
        dcp.save(state(device_mesh), storage_writer=writer)

    @pytest.mark.parametrize("hook", LOAD_EVERY)
    def test_a_load_that_fails_on_some_ranks(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, hook: str
    ) -> None:
        dcp.save(state(device_mesh), storage_writer=FolderWriter(checkpoint_dir))
        for ranks in ((0,), (1, 3), (0, 1, 2, 3)):
            reader = FaultyReader(checkpoint_dir, {hook: ranks})
            with pytest.raises(CheckpointException) as caught:
                dcp.load(state(device_mesh, fill=0), storage_reader=reader)
            assert named(caught.value) == expected(hook, ranks)
        target = state(device_mesh, fill=0)
        dcp.load(target, storage_reader=FaultyReader(checkpoint_dir, {}))
        assert torch.equal(target["plain"], numbered(6, 3))

    @pytest.mark.parametrize("hook", LOAD_COORDINATOR)
    def test_a_load_that_fails_on_the_coordinator(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, hook: str
    ) -> None:
        dcp.save(state(device_mesh), storage_writer=FolderWriter(checkpoint_dir))
        with (
            pytest.raises(CheckpointException) as caught,
            pytest.warns(FutureWarning, match="load_state_dict"),
        ):
            dcp.load_state_dict(
                state(device_mesh, fill=0),
                FaultyReader(checkpoint_dir, {hook: [0, 1, 2, 3]}),
                coordinator_rank=1,
            )
        assert named(caught.value) == expected(hook, [1])

    def test_a_planner_that_fails_is_named_too(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
    ) -> None:
        class Refusing(dcp.DefaultSavePlanner):
            def create_local_plan(self) -> dcp.SavePlan:
                if rank == 2:
                    raise KeyError("no plan")
                return super().create_local_plan()

        with pytest.raises(CheckpointException) as caught:
            dcp.save(state(device_mesh), checkpoint_id=checkpoint_dir, planner=Refusing())
        assert named(caught.value) == {2: "KeyError: 'no plan'"}
        assert list(checkpoint_dir.iterdir()) == []

    def test_a_value_that_cannot_be_pickled_is_named(self, checkpoint_dir: Path, rank: int) -> None:
        mine: dict[str, Any] = {"fine": numbered(3)}
        if rank == 1:
            mine["bad"] = lambda: 0
        with pytest.raises(CheckpointException) as caught:
            dcp.save(mine, checkpoint_id=checkpoint_dir)
        assert list(caught.value.failures) == [1]
        assert not (checkpoint_dir / ".metadata").exists()
        assert "'bad'" in str(caught.value)

    def test_ranks_that_disagree_see_where(self, checkpoint_dir: Path, rank: int) -> None:
        for name, mine in (
            ("size", numbered(3 + (rank == 2))),
            ("dtype", numbered(3, dtype=torch.float64 if rank == 2 else torch.float32)),
            ("kind", numbered(3) if rank != 2 else 5),
        ):
            with pytest.raises(CheckpointException, match=f"'w'.*{name}") as caught:
                dcp.save({"w": mine, "v": numbered(2)}, checkpoint_id=checkpoint_dir)
            assert list(caught.value.failures) == [0]

    def test_missing_parts_of_a_tensor_are_named(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
    ) -> None:
        mine = {} if rank == 2 else {"w": spread(numbered(8), device_mesh, Shard(0))}
        with pytest.raises(CheckpointException, match=r"w.*tensor-volume: 8 chunks-volume: 6"):
            dcp.save(mine, checkpoint_id=checkpoint_dir)

    def test_a_checkpoint_that_is_not_there_is_named(self, checkpoint_dir: Path) -> None:
        with pytest.raises(CheckpointException, match="nowhere") as caught:
            dcp.load({"w": numbered(3)}, checkpoint_id=checkpoint_dir / "nowhere")
        assert list(caught.value.failures) == [0, 1, 2, 3]

    def test_the_next_save_works(self, checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
        with pytest.raises(CheckpointException):
            dcp.save(
                state(device_mesh),
                storage_writer=FaultyWriter(checkpoint_dir, {"write_data": [1]}),
            )
        dist.barrier()
        dcp.save(state(device_mesh), checkpoint_id=checkpoint_dir)
        target = state(device_mesh, fill=0)
        torch_dcp.load(target, checkpoint_id=checkpoint_dir)
        assert torch.equal(target["plain"], numbered(6, 3))


@pytest.mark.parametrize("hook", [*SAVE_EVERY, *SAVE_COORDINATOR])
def test_a_save_that_fails_without_ranks(checkpoint_dir: Path, hook: str) -> None:
    with (
        pytest.raises(CheckpointException) as caught,
        pytest.warns(UserWarning, match=DISABLED),
    ):
        dcp.save({"w": numbered(3)}, storage_writer=FaultyWriter(checkpoint_dir, {hook: [0]}))
    assert named(caught.value) == expected(hook, [0])


@pytest.mark.parametrize("hook", [*LOAD_EVERY, *LOAD_COORDINATOR])
def test_a_load_that_fails_without_ranks(checkpoint_dir: Path, hook: str) -> None:
    with pytest.warns(UserWarning, match=DISABLED):
        dcp.save({"w": numbered(3)}, storage_writer=FolderWriter(checkpoint_dir))
    target = {"w": torch.zeros(3)}
    with (
        pytest.raises(CheckpointException) as caught,
        pytest.warns(UserWarning, match=DISABLED),
    ):
        dcp.load(target, storage_reader=FaultyReader(checkpoint_dir, {hook: [0]}))
    assert named(caught.value) == expected(hook, [0])
    with pytest.warns(UserWarning, match=DISABLED):
        dcp.load(target, storage_reader=FolderReader(checkpoint_dir))
    assert torch.equal(target["w"], numbered(3))
