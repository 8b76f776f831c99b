"""Faults in real saves and loads act at the given place and time; counts cover all ranks."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults import (
    FaultyStorage,
    Hang,
    InputOutput,
    Kill,
    LostReply,
    NoSpace,
    Raise,
    Unpicklable,
    Unrebuildable,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")


def state(mesh: DeviceMesh, fill: float) -> dict[str, Any]:
    full = torch.arange(6000, dtype=torch.float32).reshape(60, 100) + fill
    return {
        "sharded": distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None),
        "plain": torch.full((7, 3), fill),
        "epoch": fill,
    }


@pytest.mark.world_size([1, 2, 4], isolation="module")
class TestInWorlds:
    def test_the_disk_of_one_rank_is_full_after_some_bytes(
        self,
        faulty_storage: FaultyStorage,
        checkpoint_dir: Path,
        device_mesh: DeviceMesh,
        world_size: int,
    ) -> None:
        old, last = state(device_mesh, 1), world_size - 1
        dcp.save(old, checkpoint_id=checkpoint_dir)
        full = faulty_storage.inject(
            NoSpace(after_bytes=4096), on="write_data", rank=last, path="*.distcp"
        )
        writer = faulty_storage.writer(dcp.FileSystemWriter(checkpoint_dir))
        with pytest.raises(CheckpointException) as caught:
            dcp.save(state(device_mesh, 2), storage_writer=writer)
        assert full.fired == 1
        assert full.fired_by_rank == {last: 1}
        assert list(caught.value.failures) == [last]
        failure = caught.value.failures[last][0]
        assert isinstance(failure, OSError)
        assert failure.errno == errno.ENOSPC
        faulty_storage.assert_loads(old)
        dcp.save(state(device_mesh, 3), storage_writer=writer)
        faulty_storage.assert_loads(state(device_mesh, 3))
        with pytest.raises(AssertionError, match="epoch: 1 expected, got 3"):
            faulty_storage.assert_loads(old)

    def test_a_full_disk_at_the_commit_spares_earlier_writes(
        self,
        faulty_storage: FaultyStorage,
        checkpoint_dir: Path,
        device_mesh: DeviceMesh,
        rank: int,
    ) -> None:
        old = state(device_mesh, 1)
        dcp.save(old, checkpoint_id=checkpoint_dir)
        full = faulty_storage.inject(NoSpace(), on="finish", sticky=True)
        broken = faulty_storage.inject(InputOutput(), on="read", sticky=True, must_fire=False)
        writer = faulty_storage.writer(dcp.FileSystemWriter(checkpoint_dir))
        with pytest.raises(CheckpointException) as caught:
            dcp.save(state(device_mesh, 2), storage_writer=writer)
        failure = caught.value.failures[0][0]
        assert isinstance(failure, OSError)
        assert ".metadata" in str(failure.filename)
        assert set(full.fired_by_rank) == {0}
        before = broken.fired_by_rank.get(rank)  # the others may still clean up
        faulty_storage.assert_loads(old)  # no fault acts while it looks
        assert broken.fired_by_rank.get(rank) == before

    @pytest.mark.parametrize("fault", [Raise(KeyError), Unpicklable(), Unrebuildable()])
    def test_any_hook_of_any_rank_raises_in_any_way(
        self,
        faulty_storage: FaultyStorage,
        checkpoint_dir: Path,
        device_mesh: DeviceMesh,
        world_size: int,
        fault: Raise,
    ) -> None:
        last = world_size - 1
        for when in ("before", "after", "future"):
            failing: Any = replace(fault, when=when)
            injected = faulty_storage.inject(failing, on="writer.write_data", rank=last)
            writer = faulty_storage.writer(dcp.FileSystemWriter(checkpoint_dir))
            with pytest.raises(CheckpointException) as caught:
                dcp.save(state(device_mesh, 1), storage_writer=writer)
            assert list(caught.value.failures) == [last]
            assert injected.fired == 1
            assert not (checkpoint_dir / ".metadata").exists()

    def test_a_lost_reply_fails_a_save_whose_work_is_done(
        self, faulty_storage: FaultyStorage, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        new = state(device_mesh, 2)
        dcp.save(state(device_mesh, 1), checkpoint_id=checkpoint_dir)
        lost = faulty_storage.inject(LostReply(), on="finish")
        writer = faulty_storage.writer(dcp.FileSystemWriter(checkpoint_dir))
        with pytest.raises(CheckpointException, match="ConnectionResetError"):
            dcp.save(new, storage_writer=writer)
        assert lost.fired_by_rank == {0: 1}
        faulty_storage.assert_loads(new)

    def test_a_load_fails_in_its_hooks_and_at_its_operations(
        self,
        faulty_storage: FaultyStorage,
        checkpoint_dir: Path,
        device_mesh: DeviceMesh,
        world_size: int,
    ) -> None:
        saved, last = state(device_mesh, 1), world_size - 1
        dcp.save(saved, checkpoint_id=checkpoint_dir)
        cases: list[tuple[Any, str, str | None]] = [
            (Raise(ValueError("no")), "load_planner.create_local_plan", None),
            (Raise(ValueError("no")), "resolve_tensor", None),
            (Raise(ValueError("no")), "reader.prepare_local_plan", None),
            (Raise(ValueError("no"), when="future"), "read_data", None),
            (InputOutput(), "read_data", "*.distcp"),
            (InputOutput(), "read", ".metadata"),
        ]
        for fault, on, path in cases:
            injected = faulty_storage.inject(fault, on=on, rank=last, path=path)
            reader = faulty_storage.reader(dcp.FileSystemReader(checkpoint_dir))
            planner = faulty_storage.planner(dcp.DefaultLoadPlanner())
            with pytest.raises(CheckpointException) as caught:
                dcp.load(state(device_mesh, 0), storage_reader=reader, planner=planner)
            assert list(caught.value.failures) == [last], on
            assert injected.fired == 1, on
        faulty_storage.assert_loads(saved)

    def test_counts_are_those_of_all_ranks_and_nth_is_each_rank_s_own(
        self,
        faulty_storage: FaultyStorage,
        checkpoint_dir: Path,
        device_mesh: DeviceMesh,
        world_size: int,
    ) -> None:
        seconds = faulty_storage.inject(Raise(ValueError), on="save_planner.finish_plan", nth=2)
        for _ in range(3):
            planner = faulty_storage.planner(dcp.DefaultSavePlanner())
            try:
                dcp.save(state(device_mesh, 1), checkpoint_id=checkpoint_dir, planner=planner)
            except CheckpointException:
                continue
        assert seconds.fired_by_rank == dict.fromkeys(range(world_size), 1)


@pytest.mark.world_size(2)
def test_a_rank_that_is_killed_at_an_operation_is_counted_and_the_old_checkpoint_stays(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, rank: int
) -> None:
    tensors = {"w": torch.arange(4000.0)}
    dcp.save(tensors, checkpoint_id=checkpoint_dir)
    death = faulty_storage.inject(Kill(), on="sync", rank=1, path="*.distcp")
    sharded = {"w": torch.arange(4000.0) + 1, f"own{rank}": torch.ones(3)}
    with pytest.raises(CheckpointException, match="rank 1"):
        dcp.save(sharded, checkpoint_id=checkpoint_dir)
    assert death.fired_by_rank == {1: 1}
    faulty_storage.assert_loads(tensors, no_dist=True)


@pytest.mark.world_size(2)
def test_a_hung_operation_goes_on_when_another_rank_releases_it(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
) -> None:
    old = state(device_mesh, 1)
    dcp.save(old, checkpoint_id=checkpoint_dir)
    hung = faulty_storage.inject(Hang(), on="rename", path=".metadata")

    def release() -> None:
        hung.wait_until_fired()
        hung.release()

    releaser = threading.Thread(target=release)
    if rank == 1:
        releaser.start()
    dcp.save(state(device_mesh, 2), checkpoint_id=checkpoint_dir)
    if rank == 1:
        releaser.join()
    assert hung.fired == 1
    faulty_storage.assert_loads(state(device_mesh, 2))


def test_faults_go_along_with_a_function_into_a_world(
    worlds: Any, faulty_storage: FaultyStorage, checkpoint_dir: Path
) -> None:
    full = faulty_storage.inject(NoSpace(), on="write", rank=1, path="*.distcp")

    def body(storage: FaultyStorage) -> str:
        with storage:
            try:
                dcp.save(
                    {f"own{dist.get_rank()}": torch.ones(5)}, checkpoint_id=storage.checkpoint_dir
                )
            except CheckpointException as error:
                return str(error.failures[1][0])
        return ""

    with worlds(2) as world:
        assert all(os.strerror(errno.ENOSPC) in text for text in world.run(body, faulty_storage))
    assert full.fired_by_rank == {1: 1}
