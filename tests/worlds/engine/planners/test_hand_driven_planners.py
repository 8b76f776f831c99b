"""Frameworks that drive writer and planners by hand over all ranks, as Megatron-Core does."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader as TorchReader
from torch.distributed.checkpoint import filesystem as torchs
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from support.client_planners import BytesPlanner


class AsyncWriter(dcp.FileSystemWriter):
    """Plans and copies in the caller, writes later, commits at last: no `write_data`."""

    def __init__(self, path: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(path, *args, **kwargs)
        self.bucket: tuple[str, list[tuple[WriteItem, Any]]] | None = None
        self.results: list[WriteResult] = []

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        prefix = torchs._StoragePrefix(f"__{dist.get_rank()}_")
        return dataclasses.replace(plan, storage_data=prefix)

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        name = f"{plan.storage_data.prefix}0{torchs.DEFAULT_SUFFIX}"
        data = [
            (item, value if item.type == WriteItemType.BYTE_IO else value.detach().clone())
            for item, value in ((item, planner.resolve_data(item)) for item in plan.items)
        ]
        self.bucket = (name, data)

    def write_preloaded(self) -> None:
        assert self.bucket is not None
        name, data = self.bucket
        transforms: Any = [self.transforms] if hasattr(self, "transforms") else []
        with open(Path(self.path) / name, "wb") as stream:
            self.results = [
                torchs._write_item(
                    *transforms,
                    stream,
                    value,
                    item,
                    name,
                    serialization_format=torchs.SerializationFormat.TORCH_SAVE,
                )
                for item, value in data
            ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        raise NotImplementedError


def gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def save_in_three_calls(state: dict[str, Any], folder: Path) -> None:
    """Plan without a scatter: the coordinator gathers the plans for the metadata alone."""
    coordinates = dist.get_rank() == 0
    writer, planner = AsyncWriter(folder), BytesPlanner(flatten_state_dict=False)
    planner.set_up_planner(state, is_coordinator=coordinates)
    writer.set_up_storage_writer(coordinates)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    all_plans = gathered(plan)
    metadata: Any = None
    if coordinates:
        _, metadata = planner.create_global_plan(all_plans)
        metadata.all_local_plans = all_plans
    plan = planner.finish_plan(writer.prepare_decentralized_global_plan(plan))
    writer.prepare_write_data(plan, planner)
    writer.write_preloaded()
    all_results = gathered(writer.results)
    if coordinates:
        writer.finish(metadata, all_results)
    dist.barrier()


class Cached(dcp.FileSystemReader):
    """Keeps the metadata for the framework, which looks at them after the load."""

    kept: Metadata | None = None

    def read_metadata(self) -> Metadata:  # type: ignore[override]  # as frameworks have it
        if self.kept is None:
            self.kept = super().read_metadata()
        return self.kept


class BytesLoadPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = value


def sharded(mesh: DeviceMesh, size: int) -> DTensor:
    made: Any = distribute_tensor(torch.arange(float(size)), mesh, [Shard(0)])
    return made  # type: ignore[no-any-return]  # a DTensor


@pytest.mark.world_size(2)
def test_a_save_in_three_calls_keeps_the_plans_of_all_ranks(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    state = {"w": sharded(device_mesh, 7), f"rng.{rank}": io.BytesIO(b"rank %d" % rank)}
    save_in_three_calls(state, checkpoint_dir)
    assert sorted(p.name for p in checkpoint_dir.glob("*.distcp")) == [
        "__0_0.distcp",
        "__1_0.distcp",
    ]
    target: dict[str, Any] = {"w": sharded(device_mesh, 7), f"rng.{rank}": io.BytesIO()}
    target["w"].to_local().zero_()
    reader = Cached(checkpoint_dir)
    dcp.load(target, storage_reader=reader, planner=BytesLoadPlanner())
    assert torch.equal(target["w"].full_tensor(), torch.arange(7.0))
    assert target[f"rng.{rank}"].getvalue() == b"rank %d" % rank
    metadata: Any = reader.read_metadata()
    assert len(metadata.all_local_plans) == 2
    again = BytesPlanner(flatten_state_dict=False)
    again.set_up_planner(state, is_coordinator=rank == 0)
    mine, saved = again.create_local_plan(), metadata.all_local_plans[rank]
    # The framework compares field by field, to skip planning when nothing has changed.
    for field in dataclasses.fields(mine):
        if field.name != "storage_data":
            assert getattr(mine, field.name) == getattr(saved, field.name)


@pytest.mark.world_size(2)
def test_torch_alone_reads_a_checkpoint_saved_in_three_calls(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    save_in_three_calls({"w": sharded(device_mesh, 7)}, checkpoint_dir)
    target = {"w": torch.zeros(7)}
    torch_load(target, storage_reader=TorchReader(checkpoint_dir))
    assert torch.equal(target["w"], torch.arange(7.0))
    data = (checkpoint_dir / ".metadata").read_bytes()
    assert b"pytest_dcp.checkpoint" not in data
    assert len(pickle.loads(data).all_local_plans) == 2


@pytest.mark.world_size(2)
def test_every_rank_gets_the_attributes_that_a_planner_sets_on_the_metadata(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    class Adding(dcp.DefaultSavePlanner):
        def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.all_local_plans = all_plans  # type: ignore[attr-defined]  # under test
            metadata.of_mine = {"ranks": len(all_plans)}  # type: ignore[attr-defined]  # the same
            return plans, metadata

    made: Any = dcp.save(
        {"w": sharded(device_mesh, 7)}, checkpoint_id=checkpoint_dir, planner=Adding()
    )
    assert made.of_mine == {"ranks": 2}
    assert len(made.all_local_plans) == 2
    read: Any = dcp.FileSystemReader(checkpoint_dir).read_metadata()
    assert read.of_mine == {"ranks": 2}
    assert [len(plan.items) for plan in read.all_local_plans] == [1, 1]


@pytest.mark.world_size(2)
def test_a_tensor_that_has_grown_gets_the_stored_rows(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    """As an embedding whose vocabulary is padded for another number of ranks."""

    class Growing(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            assert self.metadata is not None
            entry: Any = self.metadata.state_dict_metadata["w"]
            before, entry.size = entry.size, torch.Size([self.size])
            plan = super().create_local_plan()
            entry.size = before
            return plan

        size = 0

    dcp.save({"w": sharded(device_mesh, 7)}, checkpoint_id=checkpoint_dir)
    for size in (11, 4):
        target = {"w": sharded(device_mesh, size)}
        target["w"].to_local().fill_(-1)
        planner = Growing()
        planner.size = size
        dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner)
        expected = torch.full((size,), -1.0)
        expected[:7] = torch.arange(7.0)[:size]
        assert torch.equal(target["w"].full_tensor(), expected)


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_load_without_a_template_can_be_of_one_rank_alone(
    rank: int, checkpoint_dir: Path
) -> None:
    dcp.save({"w": torch.arange(3.0)}, checkpoint_id=checkpoint_dir)
    if rank == 1:
        loaded = dcp.load_without_template(checkpoint_id=checkpoint_dir, no_dist=True)
        assert torch.equal(loaded["w"], torch.arange(3.0))
