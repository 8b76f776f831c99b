"""The default planners: local and global plans, replicas, partial loads, cached plans, metadata."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.default_planner as torch_planners
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import pytest_dcp.checkpoint as dcp
import pytest_dcp.checkpoint.default_planner as our_planners
from pytest_dcp.checkpoint.planner_helpers import create_read_items_for_chunk_list
from pytest_dcp.checkpoint.utils import find_state_dict_object, find_tensor_shard
from pytest_dcp.errors import CheckpointMismatchError, PlanError
from support.states import blank, numbered, same, spread, torch_dcp, without_warnings

pytestmark = pytest.mark.world_size(4, isolation="module")


def state(mesh: DeviceMesh) -> dict[str, Any]:
    return {
        "tensor": numbered(3, 2),
        "value": {"a": 1},
        "sharded": spread(numbered(10, 2), mesh, Shard(0)),
    }


def planned(planner: Any, state_dict: dict[str, Any], rank: int) -> Any:
    planner.set_up_planner(state_dict=state_dict, storage_meta=None, is_coordinator=rank == 0)
    return planner.create_local_plan()


def as_seen_by(world: Any, plan: Any) -> list[Any]:
    """Every rank's plan, as torch's own classes."""
    plans: list[Any] = world.gather(plan)
    return plans


def test_a_local_plan_is_torchs(device_mesh: DeviceMesh, rank: int) -> None:
    ours = planned(dcp.DefaultSavePlanner(), state(device_mesh), rank)
    torchs = planned(torch_dcp.DefaultSavePlanner(), state(device_mesh), rank)
    assert {item.index.fqn for item in ours.items} == {"tensor", "value.a", "sharded"}
    by_name = {item.index.fqn: item for item in torchs.items}
    for item in ours.items:
        expected = by_name[item.index.fqn]
        assert item.type == expected.type
        assert item.index.offset == expected.index.offset
        assert item.tensor_data == expected.tensor_data
    assert ours.planner_data == torchs.planner_data
    assert next(i for i in ours.items if i.index.fqn == "value.a").type == WriteItemType.BYTE_IO


def test_the_function_for_local_plans_is_torchs(device_mesh: DeviceMesh, rank: int) -> None:
    flat = {"tensor": numbered(3, 2), "value": 1, "s": spread(numbered(9), device_mesh, Shard(0))}
    ours = our_planners.create_default_local_save_plan(flat, rank == 0)
    torchs = torch_planners.create_default_local_save_plan(flat, rank == 0)
    assert [(i.index, i.type, i.tensor_data) for i in ours.items] == [
        (i.index, i.type, i.tensor_data) for i in torchs.items
    ]


def test_the_function_for_global_plans_numbers_the_chunks(
    device_mesh: DeviceMesh, world: Any
) -> None:
    flat = {"s": spread(numbered(10, 2), device_mesh, Shard(0))}
    plan = our_planners.create_default_local_save_plan(flat, False)
    plans = as_seen_by(world, plan)
    ours, metadata = our_planners.create_default_global_save_plan(plans)
    torchs, expected = torch_planners.create_default_global_save_plan(plans)
    assert [[i.index for i in p.items] for p in ours] == [
        [i.index for i in p.items] for p in torchs
    ]
    assert [i.index.index for p in ours for i in p.items] == [0, 1, 2, 3]
    stored, other = metadata.state_dict_metadata["s"], expected.state_dict_metadata["s"]
    assert isinstance(stored, TensorStorageMetadata)
    assert isinstance(other, TensorStorageMetadata)
    assert stored.size == other.size == torch.Size([10, 2])
    assert list(stored.chunks) == other.chunks
    assert [tuple(chunk.offsets) for chunk in stored.chunks] == [(0, 0), (3, 0), (6, 0), (9, 0)]


def test_a_global_plan_holds_everything_once(device_mesh: DeviceMesh, world: Any) -> None:
    mixed = state(device_mesh) | {"replica": spread(numbered(4), device_mesh, Replicate())}
    planner = dcp.DefaultSavePlanner()
    plans = as_seen_by(world, planned(planner, mixed, dist.get_rank()))
    together, metadata = planner.create_global_plan(plans)
    names = sorted(item.index.fqn for plan in together for item in plan.items)
    assert names == sorted(["tensor", "value.a", "replica", *["sharded"] * 4])
    assert set(metadata.state_dict_metadata) == {"tensor", "value.a", "replica", "sharded"}
    assert isinstance(metadata.state_dict_metadata["value.a"], BytesStorageMetadata)
    assert metadata.planner_data["value.a"] == ("value", "a")


def test_replicas_go_to_the_lowest_rank_where_that_is_wanted(
    checkpoint_dir: Path, device_mesh: DeviceMesh, world: Any
) -> None:
    replicas = {f"{n}": spread(numbered(64), device_mesh, Replicate()) for n in range(8)}
    for lowest, expected in ((True, [8, 0, 0, 0]), (False, [2, 2, 2, 2])):
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=lowest)
        plans = as_seen_by(world, planned(planner, replicas, dist.get_rank()))
        together, _ = planner.create_global_plan(plans)
        assert [len(plan.items) for plan in together] == expected
        folder = checkpoint_dir / str(lowest)
        dcp.save(
            replicas,
            checkpoint_id=folder,
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=lowest),
        )
        for engine in (dcp, torch_dcp):
            target = blank(replicas)
            engine.load(target, checkpoint_id=folder)
            assert same(target, replicas)


def test_plans_that_do_not_fit_are_refused(world: Any, rank: int) -> None:
    item = our_planners.create_default_local_save_plan({"w": numbered(4)}, True).items[0]

    def chunk(offset: int, length: int) -> Any:
        assert item.tensor_data is not None
        data = dataclasses.replace(
            item.tensor_data,
            chunk=ChunkStorageMetadata(torch.Size([offset]), torch.Size([length])),
        )
        index = MetadataIndex("w", torch.Size([offset]))
        return dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)

    for chunks, words in (
        ([(0, 2), (2, 1)], "invalid fill tensor-volume: 4 chunks-volume: 3"),
        ([(0, 3), (2, 2)], "overlapping chunks"),
        ([(0, 2), (2, 3)], "out of bounds chunk"),
    ):
        plans = [dcp.SavePlan([chunk(*c)], planner_data={"w": ("w",)}) for c in chunks]
        with pytest.raises(ValueError, match=f"w.*{words}"):
            dcp.DefaultSavePlanner().create_global_plan(plans)
        with pytest.raises(ValueError):  # torch's words are its own
            torch_dcp.DefaultSavePlanner().create_global_plan(plans)
    twice = our_planners.create_default_local_save_plan({"w": 1}, True)
    with pytest.raises(PlanError, match="Planned more than once: w"):
        our_planners.create_default_global_save_plan([twice, twice])


def test_a_load_plan_is_torchs(checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
    metadata = dcp.save(state(device_mesh), checkpoint_id=checkpoint_dir)
    flat = {
        "tensor": torch.zeros(3, 2),
        "value.a": 0,
        "sharded": spread(torch.zeros(10, 2), device_mesh, Shard(1)),
    }
    with without_warnings():
        metadata = torch_dcp.FileSystemReader(checkpoint_dir).read_metadata()
    ours = our_planners.create_default_local_load_plan(flat, metadata)
    torchs = torch_planners.create_default_local_load_plan(flat, metadata)

    def facts(plan: Any) -> list[Any]:
        return sorted(
            (
                i.type.value,
                i.dest_index.fqn,
                tuple(i.dest_index.offset or ()),
                tuple(i.dest_offsets),
                i.storage_index.fqn,
                tuple(i.storage_index.offset or ()),
                tuple(i.storage_offsets),
                tuple(i.lengths),
            )
            for i in plan.items
            if i.type == LoadItemType.TENSOR and 0 not in i.lengths
        )

    assert facts(ours) == facts(torchs)
    assert sum(item.type == LoadItemType.BYTE_IO for item in ours.items) == 1


def test_reads_for_any_boxes_of_a_tensor() -> None:
    stored = TensorStorageMetadata(
        properties=torch.distributed.checkpoint.metadata.TensorProperties(dtype=torch.float32),
        size=torch.Size([4, 4]),
        chunks=[
            ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4])),
            ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([2, 4])),
        ],
    )
    wanted = [ChunkStorageMetadata(torch.Size([1, 1]), torch.Size([2, 2]))]
    items = create_read_items_for_chunk_list("w", stored, wanted)
    assert [tuple(i.storage_offsets) for i in items] == [(1, 1), (0, 1)]
    assert [tuple(i.dest_offsets) for i in items] == [(0, 0), (1, 0)]
    assert all(tuple(i.lengths) == (1, 2) for i in items)
    assert all(tuple(i.dest_index.offset or ()) == (1, 1) for i in items)


def test_looking_things_up(device_mesh: DeviceMesh, rank: int) -> None:
    sharded = spread(numbered(10, 2), device_mesh, Shard(0))
    flat: dict[str, Any] = {"t": numbered(3), "s": sharded, "v": 5}
    offset = torch.Size([3 * rank, 0])
    assert find_tensor_shard(sharded, MetadataIndex("s", offset)) is not None
    found = find_state_dict_object(flat, MetadataIndex("s", offset))
    assert torch.equal(found, sharded.to_local())
    assert found.data_ptr() == sharded.to_local().data_ptr()
    assert torch.equal(find_state_dict_object(flat, MetadataIndex("t", torch.Size([0]))), flat["t"])
    assert find_state_dict_object(flat, MetadataIndex("v")) == 5
    for index in (
        MetadataIndex("nowhere"),
        MetadataIndex("v", torch.Size([0])),
        MetadataIndex("s", torch.Size([1, 1])),
    ):
        with pytest.raises(ValueError):  # each has words of its own
            find_state_dict_object(flat, index)


class TestPartialLoads:
    @pytest.mark.parametrize("engine", [dcp, torch_dcp], ids=["ours", "torchs"])
    def test_missing_keys_stay_as_they_are_where_that_is_allowed(
        self, checkpoint_dir: Path, engine: Any
    ) -> None:
        engine.save({"a": numbered(3), "v": 1}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.zeros(3), "b": torch.full((2,), 9.0), "v": 0, "w": "kept"}
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        report = dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner)
        assert same(target, {"a": numbered(3), "b": torch.full((2,), 9.0), "v": 1, "w": "kept"})
        assert report.missing == ("b", "w")

    def test_missing_keys_are_all_named(self, checkpoint_dir: Path, rank: int) -> None:
        dcp.save({"net.weight": numbered(3), "v": 1}, checkpoint_id=checkpoint_dir)
        target = {"net.weigth": torch.zeros(3), "absent": torch.zeros(1), "v": 0}
        with pytest.raises(CheckpointException) as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir)
        assert list(caught.value.failures) == [0, 1, 2, 3]
        error = caught.value.failures[rank][0]
        assert isinstance(error, CheckpointMismatchError)
        assert isinstance(error, RuntimeError)
        assert error.missing == ("absent", "net.weigth")
        assert "Missing key in checkpoint state_dict: " in str(error)
        assert "nearest: 'net.weight'" in str(error)
        assert target["v"] == 0

    def test_keys_missing_on_one_rank_fail_all(self, checkpoint_dir: Path, rank: int) -> None:
        dcp.save({"a": numbered(3)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.zeros(3)} | ({"b": torch.zeros(3)} if rank == 2 else {})
        with pytest.raises(CheckpointException, match="b") as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir)
        assert list(caught.value.failures) == [2]
        assert target["a"].sum() == 0

    def test_other_sizes_are_all_named(self, checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
        dcp.save(
            {"a": numbered(3), "b": numbered(2, 2), "c": numbered(8)}, checkpoint_id=checkpoint_dir
        )
        target = {
            "a": torch.zeros(4),
            "b": torch.zeros(4),
            "c": spread(torch.zeros(9), device_mesh, Shard(0)),
        }
        for planner in (None, dcp.DefaultLoadPlanner(allow_partial_load=True)):
            with pytest.raises(CheckpointException) as caught:
                dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner)
            error = caught.value.failures[0][0]
            assert isinstance(error, CheckpointMismatchError)
            assert isinstance(error, ValueError)
            assert error.mismatched == ("a", "b", "c")
            assert (
                "Size mismatch between saved torch.Size([3]) and current: torch.Size([4]) for a"
                in (str(error))
            )

    def test_a_value_cannot_become_a_tensor(self, checkpoint_dir: Path) -> None:
        dcp.save({"t": numbered(3), "v": 1}, checkpoint_id=checkpoint_dir)
        with pytest.raises(CheckpointException, match=r"'t' is a tensor .*int here"):
            dcp.load({"t": 0}, checkpoint_id=checkpoint_dir)

    def test_a_stored_value_takes_the_place_of_a_tensor(self, checkpoint_dir: Path) -> None:
        dcp.save({"v": 1}, checkpoint_id=checkpoint_dir)
        for engine in (dcp, torch_dcp):
            target: dict[str, Any] = {"v": torch.zeros(1)}
            engine.load(target, checkpoint_id=checkpoint_dir)
            assert target == {"v": 1}, engine.__name__


class TestCachedPlans:
    def test_an_unchanged_plan_is_used_again(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        for n in range(4):
            mine = {
                "w": spread(numbered(9, start=n), device_mesh, Shard(0)),
                "r": spread(numbered(5, start=n), device_mesh, Replicate()),
                "v": {"step": n},
            }
            folder = checkpoint_dir / str(n)
            dcp.save(mine, checkpoint_id=folder, planner=planner)
            for engine in (dcp, torch_dcp):
                target = blank(mine)
                engine.load(target, checkpoint_id=folder)
                assert same(target, mine), (n, engine.__name__)

    def test_an_unchanged_plan_is_not_sent(
        self, device_mesh: DeviceMesh, rank: int, world: Any
    ) -> None:
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        usable = []
        for _ in range(3):
            plan = planned(planner, state(device_mesh), rank)
            usable.append(plan.usable)
            plans = as_seen_by(world, plan)
            together = None
            if rank == 0:
                together, _ = planner.create_global_plan(plans)
            together = world.broadcast(together)
            planner.finish_plan(together[rank])
        assert usable == [True, False, False]

    def test_every_change_is_planned_anew(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
    ) -> None:
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        full = numbered(8, 4)
        states: list[dict[str, Any]] = [
            {"w": full},
            {"w": full.double()},
            {"w": full.to(torch.int32)},
            {"w": spread(full, device_mesh, Shard(0))},
            {"w": spread(full, device_mesh, Shard(1))},
            {"w": full.reshape(4, 8)},
            {"w": full.t().contiguous(), "x": 1},
            {"w": 3},
            {"w": 3, f"rank {rank}": full},
            {"w": 3, "rank 1": full} if rank == 1 else {"w": 3},
            {"a": {"b": full}},
            {"a.b": full},
        ]
        for n, mine in enumerate(states):
            folder = checkpoint_dir / str(n)
            dcp.save(mine, checkpoint_id=folder, planner=planner)
            target = blank(mine)
            torch_dcp.load(target, checkpoint_id=folder)
            assert same(target, mine), n
            if n >= 10:
                with without_warnings():
                    assert same(dcp.load_without_template(checkpoint_id=folder), mine), n

    def test_two_planners_do_not_share_their_memory(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        one, other = (dcp.DefaultSavePlanner(enable_plan_caching=True) for _ in range(2))
        model = {"model": spread(numbered(8), device_mesh, Shard(0))}
        optim = {"optim": spread(numbered(6, 2), device_mesh, Shard(0)), "lr": 0.1}
        for n in range(3):
            for name, mine, planner in (("model", model, one), ("optim", optim, other)):
                folder = checkpoint_dir / f"{name} {n}"
                dcp.save(mine, checkpoint_id=folder, planner=planner)
                target = blank(mine)
                dcp.load(target, checkpoint_id=folder)
                assert same(target, mine), (n, name)

    def test_a_failed_save_leaves_no_memory(self, checkpoint_dir: Path, rank: int) -> None:
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        with pytest.raises(CheckpointException):
            dcp.save(
                {"w": numbered(3 + rank)}, checkpoint_id=checkpoint_dir / "bad", planner=planner
            )
        for n in range(2):
            folder = checkpoint_dir / str(n)
            dcp.save({"w": numbered(3)}, checkpoint_id=folder, planner=planner)
            target = {"w": torch.zeros(3)}
            dcp.load(target, checkpoint_id=folder)
            assert torch.equal(target["w"], numbered(3))

    def test_cached_plans_work_in_torchs_engine(self, checkpoint_dir: Path) -> None:
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        for n in range(3):
            mine = {"w": numbered(3, start=n), "v": n}
            folder = checkpoint_dir / str(n)
            torch_dcp.save(
                mine,
                storage_writer=dcp.FileSystemWriter(folder),
                planner=planner,
            )
            target = blank(mine)
            dcp.load(target, checkpoint_id=folder)
            assert same(target, mine), n


def test_an_argument_without_effect_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dcp.DefaultSavePlanner(dedup_replicated_tensors=True)
    assert "no longer has any effect" in caplog.text


def test_a_state_dict_may_stay_nested(checkpoint_dir: Path) -> None:
    nested = {"w": numbered(3), "v": {"a": [1, 2], "b": "x"}}
    for engine in (dcp, torch_dcp):
        folder = checkpoint_dir / engine.__name__
        engine.save(
            nested,
            storage_writer=dcp.FileSystemWriter(folder),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
        )
        for other in (dcp, torch_dcp):
            target: dict[str, Any] = {"w": torch.zeros(3), "v": None}
            other.load(
                target,
                checkpoint_id=folder,
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            )
            assert same(target, nested), (engine.__name__, other.__name__)


def test_a_checkpoint_of_nested_lists_is_flat_as_torchs(checkpoint_dir: Path) -> None:
    nested = {
        "a": [numbered(2), {"b": numbered(3)}, [numbered(1), 4]],
        "plain": [1, [2, 3]],
        "empty": {},
        "tuple": (1, 2),
        "none": None,
        "optim": {"state": {0: {"exp": numbered(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    ours = dcp.save(nested, checkpoint_id=checkpoint_dir / "ours")
    torchs = torch_dcp.save(nested, checkpoint_id=checkpoint_dir / "torchs")
    assert dict(ours.planner_data) == dict(torchs.planner_data)
    assert set(ours.state_dict_metadata) == set(torchs.state_dict_metadata)


def test_local_tensors_of_a_mesh_of_one(checkpoint_dir: Path, rank: int) -> None:
    mesh = DeviceMesh("cpu", [rank])
    value = DTensor.from_local(numbered(3, start=rank), mesh, [Shard(0)], run_check=False)
    dcp.save({f"{rank}": value}, checkpoint_id=checkpoint_dir)
    whole = {f"{n}": torch.zeros(3) for n in range(4)}
    dcp.load(whole, checkpoint_id=checkpoint_dir)
    assert all(torch.equal(whole[f"{n}"], numbered(3, start=n)) for n in range(4))
