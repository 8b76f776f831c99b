"""Engines, planners and storages of torch's and of users', in every mixture with ours."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import pytest_dcp.checkpoint as dcp
from support.states import blank, numbered, same, spread, torch_dcp, without_warnings
from support.storages import FolderReader, FolderWriter

pytestmark = pytest.mark.world_size(3, isolation="module")

BOTH = [pytest.param(dcp, id="ours"), pytest.param(torch_dcp, id="torchs")]


def state(mesh: DeviceMesh) -> dict[str, Any]:
    full = numbered(7, 4)
    return {
        "model": {
            "rows": spread(full, mesh, Shard(0)),
            "columns": spread(full, mesh, Shard(1)),
            "replica": spread(full, mesh, Replicate()),
            "plain": full[2].clone(),
            "scalar": torch.tensor(2.5),
        },
        "step": 7,
        "list": [numbered(2), {"deep": "x"}],
    }


@pytest.mark.parametrize("saver", BOTH)
@pytest.mark.parametrize(
    ("planners", "storages"),
    [
        pytest.param(dcp, dcp, id="ours-ours"),
        pytest.param(torch_dcp, dcp, id="torchs-ours"),
        pytest.param(dcp, torch_dcp, id="ours-torchs"),
        pytest.param(torch_dcp, torch_dcp, id="torchs-torchs"),
    ],
)
def test_engines_planners_and_storages_mix(
    checkpoint_dir: Path, device_mesh: DeviceMesh, saver: Any, planners: Any, storages: Any
) -> None:
    saved = state(device_mesh)
    saver.save(
        saved,
        storage_writer=storages.FileSystemWriter(checkpoint_dir),
        planner=planners.DefaultSavePlanner(),
    )
    engines = (dcp, torch_dcp)
    for loader, reading, planning in itertools.product(engines, engines, engines):
        target = blank(saved)
        loader.load(
            target,
            storage_reader=reading.FileSystemReader(checkpoint_dir),
            planner=planning.DefaultLoadPlanner(),
        )
        assert same(target, saved), (loader.__name__, reading.__name__, planning.__name__)


@pytest.mark.parametrize("planners", BOTH)
def test_a_storage_of_a_user_works_with_its_older_hooks(
    checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int, planners: Any
) -> None:
    saved = state(device_mesh)
    writer, reader = FolderWriter(checkpoint_dir), FolderReader(checkpoint_dir)
    dcp.save(saved, storage_writer=writer, planner=planners.DefaultSavePlanner())
    target = blank(saved)
    dcp.load(target, storage_reader=reader, planner=planners.DefaultLoadPlanner())
    assert same(target, saved)
    first = [
        "set_up_storage_writer",
        "prepare_local_plan",
        "prepare_global_plan",
        "write_data",
        "finish",
    ]
    only_first = ("prepare_global_plan", "finish")
    assert writer.calls == [c for c in first if rank == 0 or c not in only_first]
    hooks = [
        "read_metadata",
        "set_up_storage_reader",
        "prepare_local_plan",
        "prepare_global_plan",
        "read_data",
    ]
    assert [c for c in reader.calls if c != "read_metadata"] == [
        c for c in hooks[1:] if rank == 0 or c != "prepare_global_plan"
    ]


@pytest.mark.parametrize("engine", BOTH)
def test_a_storage_of_a_user_works_with_our_planners_in_any_engine(
    checkpoint_dir: Path, device_mesh: DeviceMesh, engine: Any
) -> None:
    saved = state(device_mesh)
    engine.save(
        saved, storage_writer=FolderWriter(checkpoint_dir), planner=dcp.DefaultSavePlanner()
    )
    other = dcp if engine is torch_dcp else torch_dcp
    target = blank(saved)
    other.load(
        target, storage_reader=FolderReader(checkpoint_dir), planner=dcp.DefaultLoadPlanner()
    )
    assert same(target, saved)


def test_a_storage_of_a_user_can_be_reset_by_an_id(checkpoint_dir: Path) -> None:
    writer, reader = FolderWriter(Path("nowhere")), FolderReader(Path("nowhere"))
    dcp.save({"w": numbered(3)}, storage_writer=writer, checkpoint_id=checkpoint_dir)
    dcp.load(target := {"w": torch.zeros(3)}, storage_reader=reader, checkpoint_id=checkpoint_dir)
    assert torch.equal(target["w"], numbered(3))
    assert writer.calls[0] == reader.calls[0] == "reset"


@pytest.mark.parametrize("base", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_a_save_planner_may_rename_keys(checkpoint_dir: Path, base: Any) -> None:
    class Renaming(base.DefaultSavePlanner):  # type: ignore[misc]  # either's
        def set_up_planner(
            self,
            state_dict: dict[str, Any],
            storage_meta: StorageMeta | None = None,
            is_coordinator: bool = False,
        ) -> None:
            renamed = {f"foo.{key}": value for key, value in state_dict.items()}
            super().set_up_planner(renamed, storage_meta, is_coordinator)

    dcp.save({"w": numbered(3), "v": 1}, checkpoint_id=checkpoint_dir, planner=Renaming())
    target = {"foo.w": torch.zeros(3), "foo.v": 0}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, {"foo.w": numbered(3), "foo.v": 1})


@pytest.mark.parametrize("base", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_a_save_planner_may_convert_to_half(
    checkpoint_dir: Path, device_mesh: DeviceMesh, base: Any
) -> None:
    class Half(base.DefaultSavePlanner):  # type: ignore[misc]  # either's
        def create_local_plan(self) -> dcp.SavePlan:
            plan = super().create_local_plan()
            for n, item in enumerate(plan.items):
                if item.tensor_data is not None:
                    data = dataclasses.replace(
                        item.tensor_data,
                        properties=dataclasses.replace(
                            item.tensor_data.properties, dtype=torch.float16
                        ),
                    )
                    plan.items[n] = dataclasses.replace(item, tensor_data=data)
            return plan  # type: ignore[no-any-return]  # of either's base

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            found = super().resolve_data(write_item)
            return found.half() if isinstance(found, torch.Tensor) else found

    full = numbered(5, 2)
    saved = {"plain": full, "sharded": spread(full, device_mesh, Shard(0)), "v": 1}
    metadata = dcp.save(saved, checkpoint_id=checkpoint_dir, planner=Half())
    for key in ("plain", "sharded"):
        stored = metadata.state_dict_metadata[key]
        assert isinstance(stored, dcp.TensorStorageMetadata)
        assert stored.properties.dtype is torch.float16
    for engine in (dcp, torch_dcp):
        target = {"plain": torch.zeros(5, 2).half(), "sharded": torch.zeros(5, 2).half()}
        engine.load(target, checkpoint_id=checkpoint_dir)
        assert torch.equal(target["plain"], full.half())
        assert torch.equal(target["sharded"], full.half())


def test_a_save_planner_may_add_data_of_its_own(checkpoint_dir: Path, rank: int) -> None:
    class Adding(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> dcp.SavePlan:
            plan = super().create_local_plan()
            return dataclasses.replace(plan, planner_data=("said", rank, plan.planner_data))

        def create_global_plan(
            self, all_plans: list[dcp.SavePlan]
        ) -> tuple[list[dcp.SavePlan], dcp.Metadata]:
            said = [plan.planner_data[:2] for plan in all_plans]
            inner = [dataclasses.replace(p, planner_data=p.planner_data[2]) for p in all_plans]
            plans, metadata = super().create_global_plan(inner)
            plans = [
                dataclasses.replace(plan, planner_data=("told", n)) for n, plan in enumerate(plans)
            ]
            return plans, dataclasses.replace(metadata, planner_data=said)

        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            self.heard = new_plan.planner_data
            return super().finish_plan(new_plan)

    planner = Adding()
    metadata = dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir, planner=planner)
    assert metadata.planner_data == [("said", n) for n in range(3)]
    assert planner.heard == ("told", rank)
    stored = dcp.FileSystemReader(checkpoint_dir).read_metadata()
    assert stored.planner_data == [("said", n) for n in range(3)]


def test_a_save_planner_may_leave_items_out(checkpoint_dir: Path) -> None:
    class Fewer(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> dcp.SavePlan:
            plan = super().create_local_plan()
            plan.items[:] = [item for item in plan.items if item.index.fqn != "skipped"]
            return plan

    metadata = dcp.save(
        {"w": numbered(3), "skipped": numbered(4)}, checkpoint_id=checkpoint_dir, planner=Fewer()
    )
    assert list(metadata.state_dict_metadata) == ["w"]


def test_a_save_planner_with_the_older_set_up_is_warned_about(checkpoint_dir: Path) -> None:
    class Older(dcp.DefaultSavePlanner):
        def set_up_planner(  # type: ignore[override]  # the older form
            self, state_dict: dict[str, Any], is_coordinator: bool
        ) -> None:
            super().set_up_planner(state_dict, None, is_coordinator)

    with pytest.warns(UserWarning, match="include the storage_meta argument"):
        dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir, planner=Older())
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert torch.equal(target["w"], numbered(3))


def test_hooks_of_a_save_planner_see_every_item(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    class Doubling(dcp.DefaultSavePlanner):
        def lookup_object(self, index: MetadataIndex) -> Any:
            found = super().lookup_object(index)
            return found * 2

        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            assert (write_item.type == WriteItemType.BYTE_IO) == isinstance(object, int)
            return super().transform_object(write_item, object)

    full = numbered(5, 2)
    saved = {"w": full, "s": spread(full, device_mesh, Shard(0)), "v": 4}
    dcp.save(saved, checkpoint_id=checkpoint_dir, planner=Doubling())
    target = {"w": torch.zeros(5, 2), "s": torch.zeros(5, 2), "v": 0}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, {"w": full * 2, "s": full * 2, "v": 8})


@pytest.mark.parametrize("base", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_hooks_of_a_load_planner_are_asked_for_every_item(
    checkpoint_dir: Path, device_mesh: DeviceMesh, base: Any
) -> None:
    class Doubling(base.DefaultLoadPlanner):  # type: ignore[misc]  # either's
        def __init__(self) -> None:
            super().__init__()
            self.open: dict[int, torch.Tensor] = {}
            self.committed: list[str] = []
            self.bytes: list[str] = []

        def resolve_tensor(self, read_item: dcp.ReadItem) -> torch.Tensor:
            target = super().resolve_tensor(read_item)
            own = torch.empty_like(target)
            self.open[id(own)] = target
            self.kept = own
            return own

        def commit_tensor(self, read_item: dcp.ReadItem, tensor: torch.Tensor) -> None:
            self.open.pop(id(tensor)).copy_(tensor * 2)
            self.committed.append(read_item.dest_index.fqn)
            super().commit_tensor(read_item, tensor)

        def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
            assert read_item.type == LoadItemType.BYTE_IO
            self.bytes.append(read_item.dest_index.fqn)
            super().load_bytes(read_item, value)

    full = numbered(5, 2)
    saved = {"w": full, "s": spread(full, device_mesh, Shard(0)), "v": 4}
    dcp.save(saved, checkpoint_id=checkpoint_dir)
    planner = Doubling()
    target = {"w": torch.zeros(5, 2), "s": torch.zeros(5, 2), "v": 0}
    dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner)
    assert same(target, {"w": full * 2, "s": full * 2, "v": 4})
    assert planner.open == {}
    assert sorted(planner.committed) == ["s", "s", "s", "w"]
    assert planner.bytes == ["v"]


@pytest.mark.parametrize("base", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_a_load_planner_may_rename_keys(checkpoint_dir: Path, base: Any) -> None:
    class Renaming(base.DefaultLoadPlanner):  # type: ignore[misc]  # either's
        def set_up_planner(
            self,
            state_dict: dict[str, Any],
            metadata: Any = None,
            is_coordinator: bool = False,
        ) -> None:
            super().set_up_planner(state_dict, metadata, is_coordinator)
            for name in ("state_dict", "mappings"):
                renamed = {f"foo.{key}": value for key, value in getattr(self, name).items()}
                setattr(self, name, renamed)

    dcp.save({"foo.w": numbered(3), "foo.v": 5}, checkpoint_id=checkpoint_dir)
    target = {"w": torch.zeros(3), "v": 0}
    dcp.load(target, checkpoint_id=checkpoint_dir, planner=Renaming())
    assert same(target, {"w": numbered(3), "v": 5})


def test_a_load_planner_that_sees_all_plans(checkpoint_dir: Path, rank: int) -> None:
    seen: list[int] = []

    class Seeing(dcp.DefaultLoadPlanner):
        def create_global_plan(self, global_plan: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
            seen.append(len(global_plan))
            assert [len(plan.items) for plan in global_plan] == [1, 1, 1]
            return super().create_global_plan(global_plan)

    dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir)
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id=checkpoint_dir, planner=Seeing())
    assert torch.equal(target["w"], numbered(3))
    assert seen == ([3] if rank == 0 else [])


def test_planners_that_are_no_default_planners(checkpoint_dir: Path, rank: int) -> None:
    """The least that torch's abstract classes ask for."""

    class Least(SavePlanner):
        def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:  # fmt: skip # noqa: E501
            self.state = state_dict

        def create_local_plan(self) -> dcp.SavePlan:
            from torch.distributed.checkpoint.planner_helpers import _create_write_items

            if rank:
                return dcp.SavePlan([])
            return dcp.SavePlan(
                [item for k, v in self.state.items() for item in _create_write_items(k, v)]
            )

        def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> Any:
            from torch.distributed.checkpoint.default_planner import (
                create_default_global_save_plan,
            )

            return create_default_global_save_plan(all_plans)

        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            return new_plan

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            found: torch.Tensor = self.state[write_item.index.fqn]
            return found

    dcp.save({"a": numbered(3), "b": numbered(2, 2)}, checkpoint_id=checkpoint_dir, planner=Least())
    target = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, {"a": numbered(3), "b": numbered(2, 2)})


def test_a_planner_of_the_users_takes_no_options_of_the_default_one(checkpoint_dir: Path) -> None:
    dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir)
    with pytest.raises(ValueError, match="are for the default planner"):
        dcp.load(
            {"w": numbered(3)},
            checkpoint_id=checkpoint_dir,
            planner=dcp.DefaultLoadPlanner(),
            strict=False,
        )


@pytest.mark.parametrize(
    "saver",
    [
        pytest.param(dcp, id="ours"),
        pytest.param(torch_dcp, id="torchs"),
    ],
)
def test_compressed_entries_go_both_ways(
    checkpoint_dir: Path, device_mesh: DeviceMesh, saver: Any
) -> None:
    extension = pytest.importorskip("torch.distributed.checkpoint._extension")
    pytest.importorskip("zstandard")
    saved = state(device_mesh) | {"big": torch.zeros(4096)}
    writer = saver.FileSystemWriter(checkpoint_dir, _extensions=[extension.ZStandard()])
    saver.save(saved, storage_writer=writer)
    assert sum(path.stat().st_size for path in checkpoint_dir.glob("*.distcp")) < 12_000
    for engine in (dcp, torch_dcp):
        target = blank(saved)
        engine.load(target, checkpoint_id=checkpoint_dir)
        assert same(target, saved), engine.__name__


@pytest.mark.parametrize("per_rank", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_files_is_read_by_torch(
    checkpoint_dir: Path, device_mesh: DeviceMesh, per_rank: bool, threads: int
) -> None:
    saved = state(device_mesh)
    for storages in (dcp, torch_dcp):
        folder = checkpoint_dir / storages.__name__
        writer = storages.FileSystemWriter(
            folder, single_file_per_rank=per_rank, thread_count=threads, sync_files=False
        )
        storages.save(saved, storage_writer=writer)
        for engine in (dcp, torch_dcp):
            target = blank(saved)
            engine.load(target, checkpoint_id=folder)
            assert same(target, saved), engine.__name__
    ours = len(list((checkpoint_dir / dcp.__name__).glob("*.distcp")))
    assert ours == len(list((checkpoint_dir / torch_dcp.__name__).glob("*.distcp")))


def test_a_reader_of_torchs_names_the_missing_file(checkpoint_dir: Path) -> None:
    dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir)
    for reader in (dcp.FileSystemReader, torch_dcp.FileSystemReader):
        with (
            pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: x"),
            without_warnings(),
        ):
            dcp.load({"x": torch.zeros(3)}, storage_reader=reader(checkpoint_dir))
