"""The hooks one by one, as the saver and the loader call them, and their results."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from pytest_dcp.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from pytest_dcp.properties.differences import assert_state_dict_equal
from pytest_dcp.properties.suite.base import StorageTests

Id = str | os.PathLike[str]
STATE = {"w": torch.arange(6.0).reshape(2, 3), "step": 7}


class ProtocolTests(StorageTests):
    """Drives a storage by hand."""

    def test_base_classes(self, tmp_path: Path) -> None:
        """The storages are a StorageWriter and a StorageReader."""
        assert isinstance(self.make_writer(tmp_path), StorageWriter)
        assert isinstance(self.make_reader(tmp_path), StorageReader)

    def test_own_ids(self, tmp_path: Path) -> None:
        """The storages check whether an id is theirs."""
        for storage in (self.make_writer(tmp_path), self.make_reader(tmp_path)):
            assert type(storage.validate_checkpoint_id(self.checkpoint_id(tmp_path))) is bool

    def test_storage_meta(self, tmp_path: Path) -> None:
        """The storage meta is a StorageMeta or None."""
        assert isinstance(self.make_writer(tmp_path).storage_meta(), StorageMeta | None)

    def test_plan_order(self, tmp_path: Path) -> None:
        """Plans come back one for each rank, in order."""
        writer = self.make_writer(tmp_path / "checkpoint")
        writer.reset(self.checkpoint_id(tmp_path / "checkpoint"))
        _set_up(writer)
        plans = []
        for name in "ab":
            planner = DefaultSavePlanner()
            planner.set_up_planner({name: torch.ones(2)}, is_coordinator=name == "a")
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
        global_plans = writer.prepare_global_plan(plans)
        assert [[item.index.fqn for item in plan.items] for plan in global_plans] == [["a"], ["b"]]

    def test_write_results(self, tmp_path: Path) -> None:
        """write_data returns one result per item."""
        writer = self.make_writer(tmp_path / "checkpoint")
        plan, results, _ = _write_without_finish(
            writer, self.checkpoint_id(tmp_path / "checkpoint")
        )
        assert all(isinstance(result, WriteResult) for result in results)
        assert {result.index for result in results} == {item.index for item in plan.items}
        assert all(result.size_in_bytes > 0 for result in results)

    def test_unfinished(self, tmp_path: Path) -> None:
        """Nothing can be read before finish."""
        place = tmp_path / "checkpoint"
        writer = self.make_writer(place)
        _, results, metadata = _write_without_finish(writer, self.checkpoint_id(place))
        try:
            found: Any = self.make_reader(place).read_metadata()
        except Exception:  # noqa: BLE001  # each storage has its own error for a missing checkpoint
            found = None
        assert found is None
        writer.finish(metadata, [results])
        # The same reader finds it now: it did not fail for another reason.
        assert isinstance(self.make_reader(place).read_metadata(), Metadata)

    def test_metadata(self, tmp_path: Path) -> None:
        """The metadata is read back as passed to finish."""
        place = tmp_path / "checkpoint"
        writer = self.make_writer(place)
        plan, results, metadata = _write_without_finish(writer, self.checkpoint_id(place))
        writer.finish(metadata, [results])
        read = self.make_reader(place).read_metadata()
        assert isinstance(read, Metadata)
        assert read.state_dict_metadata == metadata.state_dict_metadata
        if read.storage_data is not None:
            assert set(read.storage_data) == {item.index for item in plan.items}

    def test_data(self, tmp_path: Path) -> None:
        """Data is read back as written."""
        place = tmp_path / "checkpoint"
        writer = self.make_writer(place)
        _, results, metadata = _write_without_finish(writer, self.checkpoint_id(place))
        writer.finish(metadata, [results])
        reader = self.make_reader(place)
        reader.reset(self.checkpoint_id(place))
        target = {"w": torch.zeros(2, 3), "step": 0}
        planner = DefaultLoadPlanner()
        planner.set_up_planner(target, read := reader.read_metadata(), is_coordinator=True)
        reader.set_up_storage_reader(read, is_coordinator=True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        future = reader.read_data(planner.finish_plan(plan), planner)
        assert isinstance(future, Future)
        future.wait()
        assert_state_dict_equal(target, STATE)

    def test_reset(self, tmp_path: Path) -> None:
        """reset switches to another place."""
        one, two = tmp_path / "one", tmp_path / "two"
        writer, reader = self.make_writer(one), self.make_reader(one)
        for place, number in ((one, 1), (two, 2)):
            _save(writer, self.checkpoint_id(place), {"n": torch.tensor(number)})
        for place, number in ((two, 2), (one, 1)):
            reader.reset(self.checkpoint_id(place))
            planner = DefaultLoadPlanner()
            target = {"n": torch.tensor(0)}
            planner.set_up_planner(target, read := reader.read_metadata(), is_coordinator=True)
            reader.set_up_storage_reader(read, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            (plan,) = reader.prepare_global_plan([plan])
            reader.read_data(planner.finish_plan(plan), planner).wait()
            assert target["n"].item() == number


def _set_up(writer: StorageWriter) -> None:
    writer.set_up_storage_writer(True)


def _write_without_finish(
    writer: StorageWriter, place: Id, state: dict[str, Any] | None = None
) -> tuple[SavePlan, list[WriteResult], Metadata]:
    """All steps of a save except `finish`: the plan, the results and the metadata to be."""
    writer.reset(place)
    planner = DefaultSavePlanner()
    planner.set_up_planner(state or STATE, writer.storage_meta(), is_coordinator=True)
    _set_up(writer)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (global_plan,) = writer.prepare_global_plan(plans)
    final = replace(planner.finish_plan(global_plan), storage_data=global_plan.storage_data)
    future = writer.write_data(final, planner)
    future.wait()
    return final, list(future.value()), metadata


def _save(writer: StorageWriter, place: Id, state: dict[str, Any]) -> None:
    _, results, metadata = _write_without_finish(writer, place, state)
    writer.finish(metadata, [results])
