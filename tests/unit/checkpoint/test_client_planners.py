"""Planners of other libraries, written for torch's, with ours as the base: each way of use."""

from __future__ import annotations

import dataclasses
import io
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner as TorchSavePlanner
from torch.distributed.checkpoint import FileSystemReader as TorchReader
from torch.distributed.checkpoint import FileSystemWriter as TorchWriter
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.checkpoint import save as torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint import default_planner, planner_helpers
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError
from support.client_planners import BytesPlanner

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@pytest.fixture(params=["ours", "torch's"])
def saved(request: Any, tmp_path: Path) -> Path:
    """A checkpoint of one tensor and a value."""
    folder = tmp_path / "saved"
    state = {"w": numbered(4, 3), "step": 7}
    if request.param == "ours":
        dcp.save(state, checkpoint_id=folder)
    else:
        torch_save(state, storage_writer=TorchWriter(folder), no_dist=True)
    return folder


class Resizing(dcp.DefaultLoadPlanner):
    """Lets the stored size differ, as Megatron-Core does for embeddings that grow."""

    def __init__(self, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    @contextmanager
    def _other_sizes(self) -> Any:
        assert self.metadata is not None
        entries: Any = self.metadata.state_dict_metadata
        before = {fqn: entries[fqn].size for fqn in self.sizes}
        for fqn, size in self.sizes.items():
            entries[fqn].size = size
        yield
        for fqn, size in before.items():
            entries[fqn].size = size

    def create_local_plan(self) -> LoadPlan:
        with self._other_sizes():
            return super().create_local_plan()


class TestSizesThatDiffer:
    @pytest.mark.parametrize("shape", [(6, 3), (2, 3), (4, 5), (4, 2), (6, 2)])
    def test_the_overlap_is_loaded(self, saved: Path, shape: tuple[int, int]) -> None:
        target = {"w": torch.full(shape, -1.0), "step": 0}
        dcp.load(target, checkpoint_id=saved, planner=Resizing(w=shape))
        rows, columns = min(shape[0], 4), min(shape[1], 3)
        assert torch.equal(target["w"][:rows, :columns], numbered(4, 3)[:rows, :columns])
        assert (target["w"][rows:] == -1).all()
        assert (target["w"][:, columns:] == -1).all()
        assert target["step"] == 7

    def test_the_overlap_is_loaded_from_metadata_of_the_clients_own(self, saved: Path) -> None:
        class Plain(dcp.FileSystemReader):
            def read_metadata(self) -> Metadata:  # type: ignore[override]  # as clients have it
                found = super().read_metadata()
                return dataclasses.replace(
                    found,
                    state_dict_metadata=dict(found.state_dict_metadata),
                    storage_data=dict(found.storage_data),
                )

        target = {"w": torch.full((6, 3), -1.0), "step": 0}
        dcp.load(target, storage_reader=Plain(saved), planner=Resizing(w=(6, 3)))
        assert torch.equal(target["w"][:4], numbered(4, 3))
        assert (target["w"][4:] == -1).all()

    def test_another_size_is_still_refused_unless_allowed(self, saved: Path) -> None:
        class Other(Resizing):
            pass

        target = {"w": torch.zeros(6, 3), "step": 0}
        for planner in (None, Other(), Other(w=(5, 3))):
            with pytest.raises(BaseException, match="Size mismatch") as caught:
                dcp.load(target, checkpoint_id=saved, planner=planner)
            causes = [error for error, _ in caught.value.failures.values()]  # type: ignore[attr-defined]
            assert isinstance(causes[0], CheckpointMismatchError)

    def test_bounds_of_its_own_read_the_overlap(self, saved: Path) -> None:
        class Bounds(dcp.DefaultLoadPlanner):
            def create_local_plan(self) -> LoadPlan:
                assert self.metadata is not None
                found: Any = self.metadata.state_dict_metadata["w"]
                chunk = ChunkStorageMetadata(torch.Size([2, 0]), torch.Size([4, 3]))
                items = planner_helpers.create_read_items_for_chunk_list("w", found, [chunk])
                return LoadPlan(items)

            def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
                assert index.offset == (2, 0)
                found: torch.Tensor = self.state_dict[index.fqn]
                return found

        target = {"w": torch.full((4, 3), -1.0)}
        dcp.load(target, checkpoint_id=saved, planner=Bounds())
        assert torch.equal(target["w"][:2], numbered(4, 3)[2:])
        assert (target["w"][2:] == -1).all()

    def test_items_made_for_a_tensor_of_another_size_cover_the_overlap(self, saved: Path) -> None:
        """As planners that skip or remap keys, and make the items themselves."""

        class Own(dcp.DefaultLoadPlanner):
            def create_local_plan(self) -> LoadPlan:
                assert self.metadata is not None
                items: list[ReadItem] = []
                for fqn, value in self.state_dict.items():
                    found = self.metadata.state_dict_metadata["w" if fqn == "v" else fqn]
                    made = planner_helpers._create_read_items(
                        "w" if fqn == "v" else fqn, found, value
                    )
                    items += [
                        dataclasses.replace(
                            item, dest_index=dataclasses.replace(item.dest_index, fqn=fqn)
                        )
                        for item in made
                    ]
                return LoadPlan(items)

        target = {"v": torch.full((5, 2), -1.0), "step": 0}
        dcp.load(target, checkpoint_id=saved, planner=Own())
        assert torch.equal(target["v"][:4], numbered(4, 3)[:, :2])
        assert target["step"] == 7

    def test_a_value_instead_of_a_tensor_is_named(self) -> None:
        entry = TensorStorageMetadata(TensorProperties(), torch.Size([1]), [])
        with pytest.raises(ValueError, match="Invalid checkpoint metadata for a, expected Bytes"):
            planner_helpers._create_read_items("a", entry, 3)

    def test_a_gap_of_the_checkpoint_is_still_refused(self, saved: Path) -> None:
        metadata = dcp.FileSystemReader(saved).read_metadata()
        entry: Any = metadata.state_dict_metadata["w"]
        entry.chunks[0].sizes = torch.Size((3, 3))
        planner = dcp.DefaultLoadPlanner()
        planner.set_up_planner({"w": torch.zeros(4, 3), "step": 0}, metadata, True)
        with pytest.raises(CheckpointCorruptError, match="leave a gap"):
            planner.create_local_plan()


class TestMetadataEdits:
    def test_a_planner_renames_every_key_of_the_checkpoint(self, saved: Path) -> None:
        """As planners that strip a wrapper's prefix from the names, in place."""

        class Renaming(dcp.DefaultLoadPlanner):
            def set_up_planner(
                self,
                state_dict: Any,
                metadata: Metadata | None = None,
                is_coordinator: bool = False,
            ) -> None:
                assert metadata is not None
                entries, places = metadata.state_dict_metadata, metadata.storage_data
                assert isinstance(entries, dict)
                assert isinstance(places, dict)
                renamed = {f"module.{fqn}": value for fqn, value in entries.items()}
                entries.clear()
                entries.update(renamed)
                moved = {
                    MetadataIndex(f"module.{index.fqn}", index.offset, index.index): place
                    for index, place in places.items()
                }
                places.clear()
                places.update(moved)
                super().set_up_planner(state_dict, metadata, is_coordinator)

        target = {"module.w": torch.zeros(4, 3), "module.step": 0}
        report = dcp.load(target, checkpoint_id=saved, planner=Renaming())
        assert torch.equal(target["module.w"], numbered(4, 3))
        assert target["module.step"] == 7
        ours = dcp.FileSystemReader(saved)
        ours.read_metadata()
        # Renamed entries keep their checksums.
        assert bool(report.bytes_verified) == ours.has_manifest

    def test_a_key_that_a_planner_takes_away_is_not_loaded(self, saved: Path) -> None:
        class Dropping(dcp.DefaultLoadPlanner):
            def set_up_planner(
                self,
                state_dict: Any,
                metadata: Metadata | None = None,
                is_coordinator: bool = False,
            ) -> None:
                assert metadata is not None
                metadata.state_dict_metadata.pop("w")
                super().set_up_planner(state_dict, metadata, is_coordinator)

        planner = Dropping(allow_partial_load=True)
        target = {"w": torch.zeros(4, 3), "step": 0}
        report = dcp.load(target, checkpoint_id=saved, planner=planner)
        assert report.missing == ("w",)
        assert (target["w"] == 0).all()
        assert target["step"] == 7

    def test_a_plan_made_of_edited_metadata_reads_the_right_entries(self, tmp_path: Path) -> None:
        state = {name: torch.full((2,), float(n)) for n, name in enumerate("abcd")}
        dcp.save(state, checkpoint_id=tmp_path)

        class Passing(dcp.DefaultLoadPlanner):
            """Hides a key while it plans, and puts it back: rows of the index are others then."""

            def create_local_plan(self) -> LoadPlan:
                assert self.metadata is not None
                entries = self.metadata.state_dict_metadata
                taken = entries.pop("a")
                plan = super().create_local_plan()
                rest = dict(entries)
                entries.clear()
                entries.update({"a": taken, **rest})
                return plan

        target = {name: torch.zeros(2) for name in "bcd"}
        dcp.load(target, checkpoint_id=tmp_path, planner=Passing())
        assert {name: value[0].item() for name, value in target.items()} == {"b": 1, "c": 2, "d": 3}


class TestWithoutATemplate:
    def test_a_planner_that_builds_the_state_from_the_metadata(self, saved: Path) -> None:
        """As the converters of many libraries."""

        class Building(dcp.DefaultLoadPlanner):
            def set_up_planner(
                self,
                state_dict: Any,
                metadata: Metadata | None = None,
                is_coordinator: bool = False,
            ) -> None:
                assert metadata is not None
                for fqn, entry in metadata.state_dict_metadata.items():
                    made: Any = entry
                    if isinstance(entry, TensorStorageMetadata):
                        made = torch.empty(entry.size, **entry.properties.__dict__ | {})
                    if fqn in metadata.planner_data:
                        assert metadata.planner_data[fqn] == (fqn,)
                    state_dict[fqn] = made
                super().set_up_planner(state_dict, metadata, is_coordinator)

        target: dict[str, Any] = {}
        dcp.load(target, checkpoint_id=saved, planner=Building())
        assert torch.equal(target["w"], numbered(4, 3))
        assert target["step"] == 7

    def test_keys_are_chosen_by_torchs_hook(self, saved: Path) -> None:
        class Choosing(default_planner._EmptyStateDictLoadPlanner):
            def _should_include_key(self, key: str, metadata: Metadata) -> bool:
                assert key in metadata.state_dict_metadata
                return key == "step"

        target: dict[str, Any] = {}
        dcp.load(target, checkpoint_id=saved, planner=Choosing())
        assert target == {"step": 7}

    def test_paths_may_be_lists(self, tmp_path: Path) -> None:
        class Lists(TorchSavePlanner):
            def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
                plans, metadata = super().create_global_plan(all_plans)
                data = {fqn: list(path) for fqn, path in metadata.planner_data.items()}
                return plans, dataclasses.replace(metadata, planner_data=data)

        state = {"a": {"w": torch.ones(2)}, "l": [torch.zeros(1), 5]}
        torch_save(state, storage_writer=TorchWriter(tmp_path), planner=Lists(), no_dist=True)
        for keys in (None, {"a"}):
            loaded = dcp.load_without_template(keys, checkpoint_id=tmp_path)
            assert torch.equal(loaded["a"]["w"], torch.ones(2))
            assert ("l" in loaded) is (keys is None)

    def test_it_can_be_alone(self, saved: Path) -> None:
        loaded = dcp.load_without_template(checkpoint_id=saved, no_dist=True)
        assert loaded["step"] == 7


class TestSaving:
    def test_values_that_are_bytes_already_are_stored_as_they_are(self, tmp_path: Path) -> None:
        state = {"w": numbered(3), "raw": io.BytesIO(b"any bytes")}
        dcp.save(state, checkpoint_id=tmp_path, planner=BytesPlanner(flatten_state_dict=False))

        class RawLoad(dcp.DefaultLoadPlanner):
            def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
                self.state_dict[read_item.dest_index.fqn] = value
                self.original_state_dict[read_item.dest_index.fqn] = value

        target: dict[str, Any] = {"w": torch.zeros(3), "raw": io.BytesIO()}
        dcp.load(target, checkpoint_id=tmp_path, planner=RawLoad(flatten_state_dict=False))
        assert target["raw"].getvalue() == b"any bytes"
        assert torch.equal(target["w"], numbered(3))

    def test_the_dtype_of_some_items_is_changed_alone(self, tmp_path: Path) -> None:
        """As the planner of torch's own manual, but for one tensor of several."""

        class Half(dcp.DefaultSavePlanner):
            def create_local_plan(self) -> SavePlan:
                plan = super().create_local_plan()
                for item in plan.items:
                    if item.index.fqn == "a" and item.tensor_data is not None:
                        item.tensor_data.properties.dtype = torch.float16
                return plan

            def resolve_data(self, write_item: WriteItem) -> Any:
                data = super().resolve_data(write_item)
                return data.to(torch.float16) if write_item.index.fqn == "a" else data

        state = {"a": numbered(3), "b": numbered(3)}
        dcp.save(state, checkpoint_id=tmp_path, planner=Half())
        entries: Any = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
        assert entries["a"].properties.dtype is torch.float16
        assert entries["b"].properties.dtype is torch.float32
        target = {"a": torch.zeros(3), "b": torch.zeros(3)}
        dcp.load(target, checkpoint_id=tmp_path)
        assert torch.equal(target["a"], numbered(3))
        torch_load(target, storage_reader=TorchReader(tmp_path), no_dist=True)

    @pytest.mark.parametrize("caching", [False, True])
    def test_torchs_inner_hooks_are_called(self, tmp_path: Path, caching: bool) -> None:
        calls: list[str] = []

        class Hooked(dcp.DefaultSavePlanner):
            def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
                calls.append("dedup")
                assert all(isinstance(plan.items, list) for plan in all_plans)
                return super()._dedup_save_plans(all_plans)

            def _create_global_plan(self, all_plans: list[SavePlan]) -> Any:
                calls.append("global")
                plans, metadata = super()._create_global_plan(all_plans)
                metadata.of_mine = 3  # type: ignore[attr-defined]  # under test
                return plans, metadata

        planner = Hooked(enable_plan_caching=caching)
        assert planner._enable_plan_caching is caching
        assert planner._cached_plans_key == "Hooked"
        for _ in range(2):
            made = dcp.save({"w": numbered(3)}, checkpoint_id=tmp_path, planner=planner)
            assert made.of_mine == 3  # type: ignore[attr-defined]  # under test
        assert calls == ["global", "dedup"] * (1 if caching else 2)
        assert dcp.FileSystemReader(tmp_path).read_metadata().of_mine == 3  # type: ignore[attr-defined]  # the same

    def test_torchs_hooks_of_remembered_plans_are_called(self, tmp_path: Path) -> None:
        """As Megatron-Core's planners, which remember in a way of their own around these."""
        told: list[tuple[bool, bool]] = []

        class Remembering(dcp.DefaultSavePlanner):
            def _create_global_plan_with_caching(self, all_plans: list[SavePlan]) -> Any:
                delta, plans, metadata = super()._create_global_plan_with_caching(all_plans)
                told.append((delta[0].usable, plans[0].usable))
                assert isinstance(metadata, Metadata)
                assert len(plans[0].items) == 2
                return delta, plans, metadata

            def _finish_plan_with_caching(self, new_plan: SavePlan) -> SavePlan:
                plan = super()._finish_plan_with_caching(new_plan)
                assert len(plan.items) == 2
                return plan

        planner = Remembering(enable_plan_caching=True)
        for step in range(3):
            state = {"w": numbered(4, 3) * step, "step": step}
            dcp.save(state, checkpoint_id=tmp_path / str(step), planner=planner)
            target = {"w": torch.zeros(4, 3), "step": -1}
            dcp.load(target, checkpoint_id=tmp_path / str(step))
            assert torch.equal(target["w"], state["w"])
            assert target["step"] == step
        assert told == [(True, True), (False, True), (False, True)]

    def test_remembered_plans_by_hand(self) -> None:
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner({"w": numbered(2, 2)}, is_coordinator=True)
        plan = planner.create_local_plan()
        first, whole, metadata = planner._create_global_plan_with_caching([plan])
        assert first[0] is whole[0]
        assert planner._finish_plan_with_caching(first[0]) is whole[0]
        again, same, metadata_again = planner._create_global_plan_with_caching([plan])
        assert not again[0].usable
        assert same[0] is whole[0]
        assert planner._finish_plan_with_caching(again[0]).items is whole[0].items
        assert dict(metadata_again.state_dict_metadata) == dict(metadata.state_dict_metadata)
        metadata_again.storage_data = {"x": 1}
        assert planner._create_global_plan_with_caching([plan])[2].storage_data is None


class Wrapped(torch.Tensor):
    """Looks like float32 of one size, and is int64 of another, of which its hooks tell."""

    data_of: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Wrapped:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, (99,), dtype=torch.float32)
        made.data_of = data
        return made  # type: ignore[no-any-return]  # of this class

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        size = self.data_of.size()
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        properties = TensorProperties(dtype=torch.float32)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, size),
            )
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        size = self.data_of.size()
        return [ChunkStorageMetadata(torch.Size([0] * len(size)), size)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.data_of

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_size_and_dtype_are_those_of_the_memory_that_hooks_tell_of(tmp_path: Path) -> None:
    dcp.save({"w": Wrapped(torch.arange(5)), "b": torch.ones(1)}, checkpoint_id=tmp_path)
    entry: Any = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata["w"]
    assert (entry.properties.dtype, entry.size) == (torch.int64, (5,))
    target = {"w": Wrapped(torch.zeros(5, dtype=torch.int64)), "b": torch.zeros(1)}
    report = dcp.load(target, checkpoint_id=tmp_path)
    assert target["w"].data_of.tolist() == [0, 1, 2, 3, 4]
    assert report.converted == {}
    plain = {"w": torch.zeros(5, dtype=torch.int64), "b": torch.zeros(1)}
    dcp.load(plain, checkpoint_id=tmp_path)
    assert plain["w"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(BaseException, match="dtype mismatch"):
        dcp.load({"w": Wrapped(torch.zeros(5)), "b": torch.zeros(1)}, checkpoint_id=tmp_path)


class HooksForTensors(dcp.DefaultLoadPlanner):
    """Its own `resolve_tensor` makes the engine call the hooks for each part of a tensor."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_hooks_give_parts_of_a_target_that_is_converted_or_strided(
    tmp_path: Path, dtype: torch.dtype, transposed: bool
) -> None:
    """The second part begins inside the target, but at the start of the tensor the hook gives."""
    saved: Any = torch.arange(8.0).reshape(4, 2)
    saved.global_shape = (4, 2)
    saved.global_offsets = saved.local_offsets = [(0, 0), (2, 0)]
    saved.local_sizes = [(2, 2), (2, 2)]
    dcp.save({"w": saved}, checkpoint_id=tmp_path, no_dist=True)
    target = torch.zeros(2, 4, dtype=dtype).T if transposed else torch.zeros(4, 2, dtype=dtype)
    planner = HooksForTensors(allow_partial_load=True)
    dcp.load({"w": target}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    assert target.tolist() == torch.arange(8.0).reshape(4, 2).tolist()
