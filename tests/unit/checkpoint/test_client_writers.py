"""Writers of other libraries, written for torch's, with ours as the base: each way of use."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader as TorchReader
from torch.distributed.checkpoint import filesystem as torchs
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint import filesystem as ours
from pytest_dcp.checkpoint.staging import BlockingAsyncStager
from pytest_dcp.errors import CheckpointCorruptError, PlanError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def state(step: int = 7) -> dict[str, Any]:
    return {"w": torch.arange(12.0).reshape(3, 4) * step, "b": torch.ones(2), "step": step}


def check_loads(folder: Path, step: int = 7) -> None:
    for load in (dcp.load, torch_of):
        target: dict[str, Any] = {"w": torch.zeros(3, 4), "b": torch.zeros(2), "step": 0}
        load(target, checkpoint_id=folder)
        assert torch.equal(target["w"], state(step)["w"])
        assert torch.equal(target["b"], torch.ones(2))
        assert target["step"] == step


def torch_of(target: dict[str, Any], checkpoint_id: Path) -> None:
    torch_load(target, storage_reader=TorchReader(checkpoint_id), no_dist=True)


def done(results: list[WriteResult]) -> Future[list[WriteResult]]:
    future: Future[list[WriteResult]] = Future()
    future.set_result(results)
    return future


@pytest.mark.parametrize("module", [torchs, ours], ids=["torch's", "ours"])
class TestWriteItem:
    def test_writes_items_one_by_one_with_the_function_of_the_module(
        self, tmp_path: Path, module: Any
    ) -> None:
        """As Megatron-Core's writer, which does so in processes of its own."""

        class OneByOne(dcp.FileSystemWriter):
            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
                name = f"{plan.storage_data.prefix}0{module.DEFAULT_SUFFIX}"
                results = []
                with open(self.fs.concat_path(self.path, name), "wb") as stream:
                    for item in plan.items:
                        data: Any = planner.resolve_data(item)
                        results.append(
                            module._write_item(
                                pickle.loads(pickle.dumps(self.transforms)),
                                stream,
                                data if item.type == WriteItemType.BYTE_IO else data.cpu(),
                                item,
                                name,
                                serialization_format=module.SerializationFormat.TORCH_SAVE,
                            )
                        )
                return done(results)

        dcp.save(state(), storage_writer=OneByOne(tmp_path))
        assert [file.name for file in tmp_path.glob("*.distcp")] == ["__0_0.distcp"]
        check_loads(tmp_path)

    def test_the_items_are_shared_out_by_the_function_of_the_module(
        self, tmp_path: Path, module: Any
    ) -> None:
        """As accelerate's and s3torchconnector's, which name the files and call the base."""

        class Named(dcp.FileSystemWriter):
            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
                files: queue.Queue[Any] = queue.Queue()
                for n, bucket in enumerate(module._split_by_size_and_type(2, plan.items)):
                    name = f"part-{n}{module.DEFAULT_SUFFIX}"
                    files.put((self.fs.concat_path(self.path, name), name, bucket))
                return self._write_data(planner, files)

        writer = Named(tmp_path)
        dcp.save(state(), storage_writer=writer)
        names = sorted(file.name for file in tmp_path.glob("*.distcp"))
        assert names == ["part-0.distcp", "part-1.distcp"]
        check_loads(tmp_path)
        metadata = dcp.FileSystemReader(tmp_path).read_metadata()
        assert {place.relative_path for place in metadata.storage_data.values()} == set(names)


def test_files_that_a_writer_names_have_checksums_too(tmp_path: Path) -> None:
    class Named(dcp.FileSystemWriter):
        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
            files: queue.Queue[Any] = queue.Queue()
            for n, item in enumerate(plan.items):
                name = f"{plan.storage_data.prefix}{n}.distcp"
                files.put((self.fs.concat_path(self.path, name), name, [item]))
            return self._write_data(planner, files)

    dcp.save(state(), storage_writer=Named(tmp_path))
    ones = torch.ones(2).numpy().tobytes()
    (path,) = (path for path in tmp_path.glob("*.distcp") if ones in path.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.find(ones)] ^= 1
    path.write_bytes(data)
    target = {"b": torch.zeros(2)}
    with pytest.raises(BaseException, match="'b'"):
        dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path, verify="full"))


class TestPlanHooks:
    def test_a_prefix_of_its_own_names_the_files(self, tmp_path: Path) -> None:
        """As s3torchconnector's prefix strategies."""

        @dataclass
        class Prefix:
            prefix: str

        class Prefixed(dcp.FileSystemWriter):
            def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
                return [
                    dataclasses.replace(plan, storage_data=Prefix(f"part{rank}-"))
                    for rank, plan in enumerate(plans)
                ]

        dcp.save(state(), storage_writer=Prefixed(tmp_path))
        assert all(file.name.startswith("part0-") for file in tmp_path.glob("*.distcp"))
        check_loads(tmp_path)

    def test_the_plan_has_torchs_prefix(self, tmp_path: Path) -> None:
        seen: list[Any] = []

        class Looking(dcp.FileSystemWriter):
            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
                seen.append(plan.storage_data)
                return super().write_data(plan, planner)

        dcp.save(state(), storage_writer=Looking(tmp_path))
        assert isinstance(seen[0], torchs._StoragePrefix)
        assert seen[0].prefix == "__0_"

    def test_the_items_are_lists_that_it_can_sort(self, tmp_path: Path) -> None:
        """As writers that put the tensors of a file in an order of their own."""
        seen: list[list[str]] = []

        class Sorting(dcp.FileSystemWriter):
            def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
                plan.items.sort(key=lambda item: item.index.fqn)
                return super().prepare_local_plan(plan)

            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
                plan.items.sort(key=lambda item: item.index.fqn, reverse=True)
                seen.append([item.index.fqn for item in plan.items])
                return super().write_data(plan, planner)

        dcp.save(state(), storage_writer=Sorting(tmp_path))
        assert seen == [["w", "step", "b"]]
        check_loads(tmp_path)
        report = dcp.load({"b": torch.zeros(2)}, checkpoint_id=tmp_path)
        assert report.bytes_verified

    def test_a_folder_that_it_makes_itself_is_used(self, tmp_path: Path) -> None:
        class Making(dcp.FileSystemWriter):
            def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
                os.makedirs(self.path, exist_ok=True)
                return plan

        dcp.save(state(), storage_writer=Making(tmp_path / "deep" / "er"))
        check_loads(tmp_path / "deep" / "er")

    def test_its_own_check_for_an_old_checkpoint_counts(self, tmp_path: Path) -> None:
        class Blind(dcp.FileSystemWriter):
            def _metadata_exists(self) -> bool:
                return False

        for step in (1, 2):
            dcp.save(state(step), storage_writer=Blind(tmp_path, overwrite=False))
            check_loads(tmp_path, step)
        writer = dcp.FileSystemWriter(tmp_path)
        assert writer._metadata_exists()
        assert writer._get_metadata_path() == writer.metadata_path == tmp_path / ".metadata"
        assert writer._get_metadata_path(2) == tmp_path / "__2.metadata"

    def test_the_metadata_may_go_to_a_place_of_its_own(self, tmp_path: Path) -> None:
        class Elsewhere(dcp.FileSystemWriter):
            def _get_metadata_path(self, rank: int | None = None) -> Path:
                return Path(self.path) / "index"

        dcp.save(state(), storage_writer=Elsewhere(tmp_path))
        (tmp_path / "index").rename(tmp_path / ".metadata")
        check_loads(tmp_path)


class TestFinish:
    def test_a_finish_of_its_own_pickles_the_metadata(self, tmp_path: Path) -> None:
        """As s3torchconnector's and Megatron-Core's for other storages."""

        class Pickling(dcp.FileSystemWriter):
            def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
                places: dict[MetadataIndex, Any] = {}
                for some in results:
                    assert isinstance(some, list)
                    places.update({result.index: result.storage_data for result in some})
                metadata.storage_data = places
                metadata.storage_meta = self.storage_meta() or StorageMeta()
                metadata.storage_meta.modules.append("copies=1")
                temporary = self.fs.concat_path(self.path, ".metadata.tmp")
                with self.fs.create_stream(temporary, "wb") as stream:
                    pickle.dump(metadata, stream)
                    if self.sync_files:
                        os.fsync(stream.fileno())
                if self.fs.exists(self.metadata_path):
                    self.fs.rm_file(self.metadata_path)
                self.fs.rename(temporary, self.metadata_path)

        for step in (1, 2):
            dcp.save(state(step), storage_writer=Pickling(tmp_path))
            check_loads(tmp_path, step)
        meta = dcp.FileSystemReader(tmp_path).read_metadata().storage_meta
        assert meta is not None
        assert meta.modules == ["copies=1"]
        assert b"pytest_dcp" not in (tmp_path / ".metadata").read_bytes()

    def test_results_that_it_changes_are_committed(self, tmp_path: Path) -> None:
        class Moving(dcp.FileSystemWriter):
            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
                results = super().write_data(plan, planner).value()
                for result in results:
                    old = Path(self.path) / result.storage_data.relative_path
                    if old.exists():
                        old.rename(Path(self.path) / "moved.distcp")
                    result.storage_data.relative_path = "moved.distcp"
                return done(results)

        dcp.save(state(), storage_writer=Moving(tmp_path))
        assert [file.name for file in tmp_path.glob("*.distcp")] == ["moved.distcp"]
        check_loads(tmp_path)


class TestByHand:
    def test_torchs_order_of_calls_saves(self, tmp_path: Path) -> None:
        writer, planner = dcp.FileSystemWriter(tmp_path), dcp.DefaultSavePlanner()
        writer.reset(tmp_path)
        planner.set_up_planner(state(), writer.storage_meta(), is_coordinator=True)
        writer.set_up_storage_writer(True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plan = pickle.loads(pickle.dumps(plan))
        plans, metadata = planner.create_global_plan([plan])
        (plan,) = writer.prepare_global_plan(plans)
        results = writer.write_data(planner.finish_plan(plan), planner).value()
        writer.finish(metadata, [pickle.loads(pickle.dumps(results))])
        check_loads(tmp_path)

    @pytest.mark.parametrize("storage_data", [None, torchs._StoragePrefix("__0_")])
    def test_a_plan_made_by_hand_is_written(self, tmp_path: Path, storage_data: Any) -> None:
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(state(), is_coordinator=True)
        items: list[WriteItem] = list(planner.create_local_plan().items)
        writer = dcp.FileSystemWriter(tmp_path)
        results = writer.write_data(SavePlan(items, storage_data=storage_data), planner).value()
        assert [result.index.fqn for result in results] == ["w", "b", "step"]
        assert all((tmp_path / r.storage_data.relative_path).exists() for r in results)

    @pytest.mark.parametrize(
        ("storage_data", "options", "names"),
        [
            (None, {}, {"model-00001-of-00001.safetensors"}),
            (
                {"fqn_to_index_mapping": {"w": 1, "b": 2}},
                {"fqn_to_index_mapping": {"w": 1, "b": 2}},
                {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
            ),
            (
                {"shard_index": 1},
                {"save_distributed": True},
                {"shard-00001-model-00001-of-00001.safetensors"},
            ),
        ],
    )
    def test_a_plan_made_by_hand_goes_to_files_of_safetensors(
        self, tmp_path: Path, storage_data: Any, options: Any, names: set[str]
    ) -> None:
        tensors = {"w": torch.arange(4.0), "b": torch.ones(3)}
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(tensors)
        items: list[WriteItem] = list(planner.create_local_plan().items)
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path), **options)
        results = writer.write_data(SavePlan(items, storage_data=storage_data), planner).value()
        assert {result.storage_data.relative_path for result in results} == names
        assert {file.name for file in tmp_path.iterdir()} == names
        assert [result.size_in_bytes for result in results] == [16, 12]
        _, metadata = planner.create_global_plan([SavePlan(items, planner_data=planner.mappings)])
        writer.finish(metadata, [results])
        target = {"w": torch.zeros(4), "b": torch.zeros(3)}
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
        assert torch.equal(target["w"], tensors["w"])
        assert torch.equal(target["b"], tensors["b"])

    @pytest.mark.parametrize(
        "name", ["model-00001-of-00001", "model-00001-of-00001.safetensors", "part.tmp"]
    )
    @pytest.mark.parametrize("other_files", [False, True])
    def test_results_made_by_hand_give_the_index_of_their_names(
        self, tmp_path: Path, name: str, other_files: bool
    ) -> None:
        """As tools that write the files themselves, before or after the index."""
        if other_files:
            (tmp_path / "config.json").write_text("{}")
        results = [
            WriteResult(MetadataIndex(fqn), 16, torchs._StorageInfo(name, at, 16))
            for fqn, at in (("w", 0), ("b", 16))
        ]
        known: Any = {"w": BytesStorageMetadata(), "b": BytesStorageMetadata()}
        dcp.HuggingFaceStorageWriter(str(tmp_path)).finish(Metadata(known), [results])
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index == {"metadata": {"total_size": 32}, "weight_map": {"w": name, "b": name}}

    def test_an_index_of_names_without_files_removes_no_checkpoint(self, tmp_path: Path) -> None:
        dcp.save({"w": torch.ones(4)}, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)))
        (file,) = tmp_path.glob("*.safetensors")
        result = WriteResult(MetadataIndex("w"), 16, torchs._StorageInfo(file.stem, 0, 16))
        known: Any = {"w": BytesStorageMetadata()}
        dcp.HuggingFaceStorageWriter(str(tmp_path)).finish(Metadata(known), [[result]])
        assert file.exists()

    def test_the_index_of_another_programs_files_lets_them_be_read(self, tmp_path: Path) -> None:
        save_file = pytest.importorskip("safetensors.torch").save_file
        name, place = "own.safetensors", MetadataIndex("w", torch.Size([0]))
        save_file({"w": torch.arange(4.0)}, tmp_path / name)
        result = WriteResult(place, 16, torchs._StorageInfo(name, 0, 16))
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner({"w": torch.arange(4.0)}, is_coordinator=True)
        _, metadata = planner.create_global_plan([planner.create_local_plan()])
        dcp.HuggingFaceStorageWriter(str(tmp_path)).finish(metadata, [[result]])
        target = {"w": torch.zeros(4)}
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
        assert target["w"].tolist() == [0, 1, 2, 3]


class TestResultsBesideThePlan:
    @pytest.mark.parametrize("known", [True, False])
    def test_a_writers_additions_are_kept_for_its_readers(
        self, tmp_path: Path, known: bool
    ) -> None:
        """As writers that keep a file of their own with the checkpoint, and look it up again."""
        own = MetadataIndex("own", torch.Size([2]))

        class Adding(dcp.FileSystemWriter):
            def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
                name = f"__9_0_{self.save_id[:12]}.distcp"
                (Path(self.path) / name).write_bytes(b"own bytes")
                place = torchs._StorageInfo(name, 4, 5, ["stream.own/1"])
                super().finish(metadata, [*results, [WriteResult(own, 5, place)]])

        saved = state() if known else {}
        for step in range(2):
            metadata = dcp.save(saved | {"n": step}, storage_writer=Adding(tmp_path))
            assert metadata.storage_data[own].length == 5
        for reader in (dcp.FileSystemReader(tmp_path), TorchReader(tmp_path)):
            found = reader.read_metadata()
            place = found.storage_data[own]
            data = (tmp_path / place.relative_path).read_bytes()
            assert data[place.offset :][: place.length] == b"bytes"
            assert place.transform_descriptors == ["stream.own/1"]
            assert "own" not in found.state_dict_metadata
            assert len(found.storage_data) == 2 + len(saved)
        if known:
            check_loads(tmp_path)
        target = {"n": -1}
        dcp.load(target, checkpoint_id=tmp_path)
        assert target == {"n": 1}

    def test_an_item_that_no_rank_wrote_is_still_an_error(self, tmp_path: Path) -> None:
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner({"w": torch.ones(2)}, is_coordinator=True)
        _, metadata = planner.create_global_plan([planner.create_local_plan()])
        place = torchs._StorageInfo("other", 0, 5)
        with pytest.raises(PlanError, match="written by no rank"):
            dcp.FileSystemWriter(tmp_path).finish(
                metadata, [[WriteResult(MetadataIndex("x"), 5, place)]]
            )


class TestFilesOfSafetensors:
    def test_the_items_of_each_file_are_the_subclass_own(self, tmp_path: Path) -> None:
        class Own(dcp.HuggingFaceStorageWriter):
            def _split_by_storage_plan(self, storage_plan: Any, items: Any) -> Any:
                assert storage_plan == self.fqn_to_index_mapping
                split = super()._split_by_storage_plan(storage_plan, items)
                (last,) = [item for item in items if item.index.fqn == "c"]
                return {n: [i for i in of if i is not last] for n, of in split.items()} | {
                    4: [last]
                }

        stored = {name: torch.full((2,), float(n)) for n, name in enumerate("abc")}
        dcp.save(stored, storage_writer=Own(str(tmp_path), {"a": 1, "b": 2, "c": 2}))
        weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        assert [weights[name].split("-")[1] for name in "abc"] == ["00001", "00002", "00004"]
        target = {name: torch.zeros(2) for name in "abc"}
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
        assert [value.tolist() for value in target.values()] == [[n] * 2 for n in range(3)]

    def test_the_split_by_hand_and_one_that_loses_an_item(self, tmp_path: Path) -> None:
        class Losing(dcp.HuggingFaceStorageWriter):
            def _split_by_storage_plan(self, storage_plan: Any, items: Any) -> Any:
                return {1: items[1:]}

        items = [WriteItem(MetadataIndex(name), WriteItemType.TENSOR) for name in "abc"]
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path))
        assert writer._split_by_storage_plan(None, items) == {1: items}
        split = writer._split_by_storage_plan({"a": 2, "b": 1, "c": 2}, items)
        assert split == {2: [items[0], items[2]], 1: [items[1]]}
        with pytest.raises(PlanError, match="'c' is not in fqn_to_index_mapping"):
            writer._split_by_storage_plan({"a": 2, "b": 1}, items)
        with pytest.raises(PlanError, match=r"1 item\(s\) are in no file of Losing"):
            dcp.save({"a": torch.ones(1), "b": torch.ones(1)}, storage_writer=Losing(str(tmp_path)))


class TestTransforms:
    def test_extensions_that_are_set_later_count(self, tmp_path: Path) -> None:
        pytest.importorskip("zstandard")
        from torch.distributed.checkpoint._extension import ZStandard

        for transforms in (torchs._StorageWriterTransforms, ours._StorageWriterTransforms):
            writer = dcp.FileSystemWriter(tmp_path)
            assert tuple(writer.transforms.extensions) == ()
            chosen: Any = transforms([ZStandard()])
            writer.transforms = chosen
            dcp.save(state(), storage_writer=writer)
            places = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
            assert all(place.transform_descriptors for place in places)
            check_loads(tmp_path)

    @pytest.mark.parametrize("base", [torchs._StorageWriterTransforms, object])
    def test_a_stream_of_its_own_for_each_item(self, tmp_path: Path, base: Any) -> None:
        """One that says what a reader must undo, for some of the items."""
        asked: list[str] = []

        class Own(base):  # type: ignore[misc]  # any class
            def transform_save_stream(self, write_item: Any, raw_stream: Any) -> Any:
                asked.append(write_item.index.fqn)
                plain = write_item.index.fqn == "b"
                assert raw_stream.tell() >= 0
                return _Flipping(raw_stream, 0 if plain else 255), [] if plain else [
                    "stream.flip/1"
                ]

        writer = dcp.FileSystemWriter(tmp_path)
        own: Any = Own()
        writer.transforms = own
        dcp.save(state(), storage_writer=writer)
        assert sorted(asked) == ["b", "step", "w"]
        registry = ExtensionRegistry()
        registry.register(Flip)
        for reader in (
            dcp.FileSystemReader(tmp_path, registry, verify="full"),
            TorchReader(tmp_path, registry),
        ):
            target: dict[str, Any] = {"w": torch.zeros(3, 4), "b": torch.zeros(2), "step": 0}
            load = dcp.load if isinstance(reader, dcp.FileSystemReader) else torch_load
            load(target, storage_reader=reader, no_dist=True)
            assert torch.equal(target["w"], state()["w"])
            assert target["b"].tolist() == [1, 1]
            assert target["step"] == 7
        places = dcp.FileSystemReader(tmp_path).read_metadata().storage_data
        told = {key.fqn: place.transform_descriptors for key, place in places.items()}
        assert told == {"w": ["stream.flip/1"], "step": ["stream.flip/1"], "b": None}

    def test_a_stream_unknown_to_the_reader_is_undone_by_the_readers_own(
        self, tmp_path: Path
    ) -> None:
        class Own:
            def transform_save_stream(self, write_item: Any, raw_stream: Any) -> Any:
                return _Flipping(raw_stream, 255), []

        class Back:
            def transform_load_stream(self, item: Any, descriptors: Any, stream: Any) -> Any:
                return io.BytesIO(bytes(byte ^ 255 for byte in stream.read()))

        writer, reader = dcp.FileSystemWriter(tmp_path), dcp.FileSystemReader(tmp_path)
        own: Any = Own()
        back: Any = Back()
        writer.transforms, reader.transforms = own, back
        dcp.save(state(), storage_writer=writer)
        target: dict[str, Any] = {"w": torch.zeros(3, 4), "b": torch.zeros(2), "step": 0}
        dcp.load(target, storage_reader=reader)
        assert torch.equal(target["w"], state()["w"])
        assert target["step"] == 7
        for verify in ("auto", "off"):
            with pytest.raises(CheckpointCorruptError):
                dcp.load({"w": torch.zeros(3, 4)}, checkpoint_id=tmp_path, verify=verify)  # type: ignore[arg-type]

    def test_a_stream_of_its_own_in_a_file_for_each_item_and_in_safetensors(
        self, tmp_path: Path
    ) -> None:
        own: Any = _FlipsAll()
        writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=False, thread_count=2)
        writer.transforms = own
        dcp.save(state(), storage_writer=writer)
        registry = ExtensionRegistry()
        registry.register(Flip)
        target: dict[str, Any] = {"w": torch.zeros(3, 4), "b": torch.zeros(2), "step": 0}
        dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path, registry))
        assert torch.equal(target["w"], state()["w"])
        kind = torchs.SerializationFormat.SAFETENSORS
        writer = dcp.FileSystemWriter(tmp_path / "st", serialization_format=kind)
        writer.transforms = own
        with pytest.raises(BaseException, match="do not go with safetensors"):
            dcp.save({"w": torch.ones(3)}, storage_writer=writer)


class _Flipping(io.RawIOBase):
    """Flips bits on the way to a stream, which it closes too, as a careless one does."""

    def __init__(self, raw: Any, bits: int) -> None:
        self.raw, self.bits = raw, bits

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return int(self.raw.write(bytes(byte ^ self.bits for byte in memoryview(data).cast("B"))))

    def close(self) -> None:
        if not self.closed:
            self.raw.close()
        super().close()


class _FlipsAll:
    def transform_save_stream(self, write_item: Any, raw_stream: Any) -> Any:
        return _Flipping(raw_stream, 255), ["stream.flip/1"]


class Flip(StreamTransformExtension):
    @staticmethod
    def registry_name() -> str:
        return "stream.flip"

    @staticmethod
    def from_descriptor(version: str) -> Flip:
        return Flip()

    def get_descriptor(self) -> str:
        return "stream.flip/1"

    def transform_to(self, output: Any) -> Any:
        return _Flipping(output, 255)

    def transform_from(self, input: Any) -> Any:
        return io.BytesIO(bytes(byte ^ 255 for byte in input.read()))


class TestStaging:
    def test_the_writers_stage_is_called_and_needs_no_copy_ahead(self, tmp_path: Path) -> None:
        calls: list[str] = []

        class Staging(dcp.FileSystemWriter):
            def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
                calls.append("stage")
                return super().stage(state_dict)

        writer = Staging(tmp_path)
        dcp.async_save(state(), storage_writer=writer).result(60)
        assert calls == ["stage"]
        assert writer.per_thread_copy_ahead == 0
        check_loads(tmp_path)
        plain = dcp.FileSystemWriter(tmp_path)
        dcp.async_save(state(2), storage_writer=plain).result(60)
        assert plain.per_thread_copy_ahead == 0
        check_loads(tmp_path, 2)

    def test_a_writer_that_synchronizes_after_the_start_is_asked_to(self, tmp_path: Path) -> None:
        calls: list[str] = []

        class Late(dcp.FileSystemWriter):
            _synchronize_after_execute = True

            def synchronize_staging(self) -> None:
                calls.append("synchronized")

        dcp.async_save(state(), storage_writer=Late(tmp_path)).result(60)
        assert calls == ["synchronized"]
        check_loads(tmp_path)

    def test_a_writer_asked_through_the_property_synchronizes(self, tmp_path: Path) -> None:
        calls: list[str] = []

        class Late(dcp.FileSystemWriter):
            @property
            def should_synchronize_after_execute(self) -> bool:
                return True

            def synchronize_staging(self) -> None:
                calls.append("synchronized")

        dcp.async_save(state(), storage_writer=Late(tmp_path)).result(60)
        assert calls == ["synchronized"]

    def test_a_kept_copy_is_filled_anew(self) -> None:
        stager = BlockingAsyncStager(cache_staged_state_dict=True)
        assert isinstance(stager, AsyncStager)
        assert stager.state_dict_cache is None
        first = stager.stage({"a": {"w": torch.ones(4)}, "step": 1, "l": [torch.ones(2)]})
        assert stager.state_dict_cache is first
        where = first["a"]["w"].data_ptr()
        second = stager.stage({"a": {"w": torch.zeros(4)}, "step": 2, "l": [torch.zeros(2)]})
        assert second is first
        assert second["a"]["w"].data_ptr() == where
        assert second["a"]["w"].tolist() == [0] * 4
        assert (second["step"], second["l"][0].tolist()) == (2, [0, 0])
        other = stager.stage({"a": {"w": torch.zeros(5)}})
        assert other["a"]["w"].shape == (5,)
        assert list(other) == ["a"]

    def test_a_kept_copy_is_not_filled_while_it_is_saved(self, tmp_path: Path) -> None:
        class Slow(dcp.FileSystemWriter):
            def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
                started.put(None)
                assert go_on.get(timeout=60) is None
                return super().write_data(plan, planner)

        started: queue.Queue[None] = queue.Queue()
        go_on: queue.Queue[None] = queue.Queue()
        writer = Slow(tmp_path / "1", cache_staged_state_dict=True)
        saving = dcp.async_save(state(1), storage_writer=writer)
        started.get(timeout=60)
        staged: queue.Queue[Any] = queue.Queue()
        import threading

        again = threading.Thread(target=lambda: staged.put(writer.stage(state(2))))
        again.start()
        with pytest.raises(queue.Empty):
            staged.get(timeout=0.3)
        go_on.put(None)
        again.join(60)
        assert torch.equal(staged.get(timeout=60)["w"], state(2)["w"])
        saving.result(60)
        check_loads(tmp_path / "1", 1)


def test_a_lost_file_of_a_client_is_seen_before_the_commit(tmp_path: Path) -> None:
    class Losing(dcp.FileSystemWriter):
        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
            results = super().write_data(plan, planner).value()
            for result in results:
                result.storage_data.relative_path = "nowhere.distcp"
            return done(results)

    with pytest.raises(BaseException) as caught:
        dcp.save(state(), storage_writer=Losing(tmp_path))
    causes = [error for error, _ in caught.value.failures.values()]  # type: ignore[attr-defined]
    assert isinstance(causes[0], CheckpointCorruptError)
    assert not (tmp_path / ".metadata").exists()
