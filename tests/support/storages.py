"""Storages and planners as a user of torch's checkpoint interfaces writes them. Fakes, no mocks."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future


def resolved_future(value: Any = None) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class FolderWriter(StorageWriter):
    """One pickle for each rank; the hooks are those of torch 2.1, without keyword arguments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[str] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.calls.append("reset")
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        self.calls.append("set_up_storage_writer")
        self.path.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.calls.append("prepare_local_plan")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.calls.append("prepare_global_plan")
        return [
            SavePlan(plan.items, storage_data=f"part {n}", planner_data=plan.planner_data)
            for n, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.calls.append("write_data")
        name: str = plan.storage_data
        content: dict[MetadataIndex, Any] = {}
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                content[item.index] = data.getvalue()
                size = len(content[item.index])
            else:
                assert isinstance(data, torch.Tensor)
                content[item.index] = data.detach().cpu().clone()
                size = data.numel() * data.element_size()
            results.append(WriteResult(item.index, size, name))
        (self.path / name).write_bytes(pickle.dumps(content))
        return resolved_future(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.calls.append("finish")
        metadata.storage_data = {r.index: r.storage_data for some in results for r in some}
        (self.path / "index").write_bytes(pickle.dumps(metadata))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class FolderReader(StorageReader):
    """Reads the checkpoints of FolderWriter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[str] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.calls.append("reset")
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def read_metadata(self) -> Metadata:
        self.calls.append("read_metadata")
        metadata: Metadata = pickle.loads((self.path / "index").read_bytes())
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self.calls.append("set_up_storage_reader")
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        self.calls.append("prepare_local_plan")
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        self.calls.append("prepare_global_plan")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self.calls.append("read_data")
        parts: dict[str, Any] = {}
        for item in plan.items:
            name = self.places[item.storage_index]
            if name not in parts:
                parts[name] = pickle.loads((self.path / name).read_bytes())
            found = parts[name][item.storage_index]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(found))
                continue
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                found = found.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            assert target.shape == found.shape
            target.copy_(found)
            planner.commit_tensor(item, target)
        return resolved_future()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


Fails = Mapping[str, Sequence[int]]
"""The ranks on which each hook fails."""


def failing(fails: Fails, hook: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank in fails.get(hook, ()):
        raise ValueError(f"{hook} fails on rank {rank}")


class FaultyWriter(FolderWriter):
    """Fails in the given hooks, on the given ranks; for `write_data_later`, in the future."""

    def __init__(self, path: Path, fails: Fails) -> None:
        super().__init__(path)
        self.fails = fails

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        failing(self.fails, "set_up_storage_writer")
        super().set_up_storage_writer(is_coordinator)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        failing(self.fails, "prepare_local_plan")
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        failing(self.fails, "prepare_global_plan")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        failing(self.fails, "write_data")
        try:
            failing(self.fails, "write_data_later")
        except ValueError as error:
            future: Future[Any] = Future()
            future.set_exception(error)
            return future
        return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        failing(self.fails, "finish")
        super().finish(metadata, results)


class FaultyReader(FolderReader):
    """As FaultyWriter."""

    def __init__(self, path: Path, fails: Fails) -> None:
        super().__init__(path)
        self.fails = fails

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        failing(self.fails, "read_metadata")
        return super().read_metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        failing(self.fails, "set_up_storage_reader")
        super().set_up_storage_reader(metadata, is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        failing(self.fails, "prepare_local_plan")
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        failing(self.fails, "prepare_global_plan")
        return super().prepare_global_plan(plans)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        failing(self.fails, "read_data")
        try:
            failing(self.fails, "read_data_later")
        except ValueError as error:
            future: Future[Any] = Future()
            future.set_exception(error)
            return future
        return super().read_data(plan, planner)
