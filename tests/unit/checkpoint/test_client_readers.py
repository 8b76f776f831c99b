"""Readers of other libraries, written for torch's, with ours as the base: each way of use."""

from __future__ import annotations

import io
import os
import pickle
import queue
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
import torch
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.filesystem import FileSystem as TorchFileSystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.filesystem import FileSystem, FileSystemBase
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state() -> dict[str, Any]:
    return {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2), "step": 7}


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(3, 4), "b": torch.zeros(2), "step": 0}


def check_loaded(target: dict[str, Any]) -> None:
    expected = state()
    assert torch.equal(target["w"], expected["w"])
    assert torch.equal(target["b"], expected["b"])
    assert target["step"] == expected["step"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    dcp.save(state(), checkpoint_id=folder)
    return folder


class TestReadDataOfItsOwn:
    def test_finds_the_place_of_each_item_and_calls_the_base(self, saved: Path) -> None:
        """As Composer's readers, which check or download files before they are read."""

        class Checking(dcp.FileSystemReader):
            spans: dict[str, list[tuple[int, int]]]

            def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
                self.spans = {}
                for item in plan.items:
                    place = self.storage_data[item.storage_index]
                    path = os.path.join(self.path, place.relative_path)
                    self.spans.setdefault(path, []).append((place.offset, place.length))
                return super().read_data(plan, planner)

        reader, target = Checking(saved), blank()
        dcp.load(target, storage_reader=reader)
        check_loaded(target)
        for path, spans in reader.spans.items():
            data = Path(path).read_bytes()
            assert all(data[at : at + 4] == b"PK\x03\x04" for at, _ in spans)
        assert sum(map(len, reader.spans.values())) == 3

    def test_reads_all_by_itself_through_slices_and_transforms(self, saved: Path) -> None:
        """As Megatron-Core's and object stores' readers, which copy the body of torch's reader."""

        class Own(dcp.FileSystemReader):
            def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
                for item in plan.items:
                    place = self.storage_data[item.storage_index]
                    path = self.fs.concat_path(self.path, place.relative_path)
                    with self.fs.create_stream(path, "rb") as stream:
                        part = self._slice_file(stream, place)
                        plain = self.transforms.transform_load_stream(
                            item, place.transform_descriptors or (), part
                        )
                        assert plain.seekable()
                        if item.type == LoadItemType.BYTE_IO:
                            planner.load_bytes(item, io.BytesIO(plain.read(-1)))
                        else:
                            tensor = torch.load(plain, map_location="cpu", weights_only=True)
                            planner.resolve_tensor(item).detach().copy_(tensor)
                            planner.commit_tensor(item, tensor)
                future: torch.futures.Future[None] = torch.futures.Future()
                future.set_result(None)
                return future

        target = blank()
        dcp.load(target, storage_reader=Own(saved))
        check_loaded(target)

    def test_hands_the_base_one_item_after_the_other(self, saved: Path) -> None:
        class OneByOne(dcp.FileSystemReader):
            def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
                for item in plan.items:
                    done = super().read_data(LoadPlan([item]), planner)
                    done.wait()
                return done

        target = blank()
        dcp.load(target, storage_reader=OneByOne(saved))
        check_loaded(target)

    def test_looks_at_every_place_when_it_is_set_up(self, saved: Path) -> None:
        class Counting(dcp.FileSystemReader):
            known: dict[MetadataIndex, int]

            def set_up_storage_reader(
                self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
            ) -> None:
                super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
                assert all(isinstance(place, _StorageInfo) for place in self.storage_data.values())
                self.known = {index: place.length for index, place in self.storage_data.items()}

        reader, target = Counting(saved), blank()
        dcp.load(target, storage_reader=reader)
        check_loaded(target)
        assert {index.fqn for index in reader.known} == {"w", "b", "step"}


class TestHooks:
    def test_slices_of_its_own_are_read(self, saved: Path) -> None:
        class Buffered(dcp.FileSystemReader):
            taken = 0

            def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
                data = super()._slice_file(file, sinfo).read()
                self.taken += len(data)
                return io.BytesIO(data)

        reader, target = Buffered(saved), blank()
        report = dcp.load(target, storage_reader=reader)
        check_loaded(target)
        lengths = [place.length for place in reader.storage_data.values()]
        assert reader.taken == sum(lengths) == report.bytes_read

    def test_damage_by_its_slices_is_refused(self, saved: Path) -> None:
        class Damaging(dcp.FileSystemReader):
            def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
                data = bytearray(super()._slice_file(file, sinfo).read())
                at = data.find(torch.ones(2).numpy().tobytes())
                if at >= 0:
                    data[at] ^= 1
                return io.BytesIO(data)

        with pytest.raises(BaseException, match="CRC") as caught:
            dcp.load(blank(), storage_reader=Damaging(saved))
        assert "'b'" in str(caught.value)

    def test_transforms_of_its_own_are_applied(self, saved: Path) -> None:
        class Seen:
            def __init__(self) -> None:
                self.names: list[str] = []

            def transform_load_stream(
                self, read_item: ReadItem, descriptors: Any, raw_stream: IO[bytes]
            ) -> IO[bytes]:
                self.names.append(read_item.storage_index.fqn)
                return raw_stream

        reader, target = dcp.FileSystemReader(saved), blank()
        transforms: Any = Seen()
        reader.transforms = transforms
        dcp.load(target, storage_reader=reader)
        check_loaded(target)
        assert sorted(transforms.names) == ["b", "step", "w"]

    def test_the_metadata_may_be_in_a_place_of_its_own(self, saved: Path) -> None:
        class Elsewhere(dcp.FileSystemReader):
            def _get_metadata_path(self, rank: int | None = None) -> Path:
                return Path(self.path) / "meta" / "index"

        assert dcp.FileSystemReader(saved)._get_metadata_path() == saved / ".metadata"
        assert dcp.FileSystemReader(saved)._get_metadata_path(3) == saved / "__3.metadata"
        (saved / "meta").mkdir()
        (saved / ".metadata").rename(saved / "meta" / "index")
        target = blank()
        dcp.load(target, storage_reader=Elsewhere(saved))
        check_loaded(target)

    def test_metadata_that_it_unpickles_itself_are_taken(self, saved: Path) -> None:
        class Unpickling(dcp.FileSystemReader):
            def read_metadata(self) -> Metadata:  # type: ignore[override]  # as clients have it
                path = self.fs.concat_path(self.path, ".metadata")
                with self.fs.create_stream(path, "rb") as stream:
                    metadata: Metadata = pickle.load(stream)
                assert metadata.storage_meta is not None
                metadata.storage_meta.load_id = self.load_id
                return metadata

        target = blank()
        dcp.load(target, storage_reader=Unpickling(saved))
        check_loaded(target)

    def test_metadata_that_it_keeps_serve_many_loads(self, saved: Path) -> None:
        class Cached(dcp.FileSystemReader):
            kept: Metadata | None = None

            def read_metadata(self) -> Metadata:  # type: ignore[override]  # as clients have it
                if self.kept is None:
                    self.kept = super().read_metadata()
                return self.kept

        reader = Cached(saved)
        for _ in range(2):
            target = blank()
            dcp.load(target, storage_reader=reader)
            check_loaded(target)
        assert reader.read_metadata() is reader.kept


class TestRequestsOfSafetensors:
    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_subclass_makes_the_values_itself(self, tmp_path: Path, threads: int) -> None:
        """As readers that dequantise with scales of the same file."""

        class Scaling(dcp.HuggingFaceStorageReader):
            asked: ClassVar[list[str]] = []

            def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
                name = req.storage_index.fqn
                self.asked.append(name)
                if name != "w":
                    super()._process_read_request(f, req, planner)
                    return
                assert f.get_slice("w").get_shape() == [4, 3]
                assert f.get_slice("w").get_dtype() == "F16"
                box = tuple(
                    slice(at, at + n)
                    for at, n in zip(req.storage_offsets, req.lengths, strict=True)
                )
                values = f.get_slice("w")[box].float() * f.get_tensor("scale")
                target = planner.resolve_tensor(req)
                target.copy_(values)
                planner.commit_tensor(req, target)

        stored = {
            "w": torch.arange(12.0).reshape(4, 3).half(),
            "scale": torch.tensor(3.0),
            "x": torch.ones(2),
        }
        mapping = {"w": 1, "scale": 1, "x": 2}
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path), mapping)
        dcp.save(stored, storage_writer=writer)
        target = {"w": torch.zeros(4, 3), "scale": torch.zeros(()), "x": torch.zeros(2)}
        report = dcp.load(target, storage_reader=Scaling(str(tmp_path), threads))
        assert sorted(Scaling.asked) == ["scale", "w", "x"]
        assert target["w"].tolist() == (torch.arange(12.0).reshape(4, 3) * 3).tolist()
        assert (target["scale"].item(), target["x"].tolist()) == (3.0, [1.0, 1.0])
        assert report.bytes_read == 24 + 4 + 4 + 8

    @pytest.mark.parametrize("threads", [1, 3])
    def test_the_files_are_given_to_threads_in_a_queue(self, tmp_path: Path, threads: int) -> None:
        """As readers that open the files themselves, or retry; and the hook called by hand."""
        safe_open = pytest.importorskip("safetensors").safe_open

        class Opening(dcp.HuggingFaceStorageReader):
            opened: ClassVar[list[str]] = []

            def _read_files_from_queue(
                self, file_queue: queue.Queue[Any], result_queue: queue.Queue[Any], planner: Any
            ) -> None:
                while True:
                    try:
                        name, items = file_queue.get_nowait()
                    except queue.Empty:
                        return
                    with safe_open(filename=name, framework="pt") as file:
                        for item in items:
                            self._process_read_request(file, item, planner)
                    self.opened.append(os.path.basename(name))
                    result_queue.put(True)

        class Losing(dcp.HuggingFaceStorageReader):
            def _read_files_from_queue(self, *_: Any) -> None: ...

        class ByHand(dcp.HuggingFaceStorageReader):
            def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
                files: queue.Queue[Any] = queue.Queue()
                done: queue.Queue[Any] = queue.Queue()
                for item in plan.items:
                    files.put((self.storage_data[item.storage_index].relative_path, [item]))
                self._read_files_from_queue(files, done, planner)
                assert done.qsize() == len(plan.items)
                future: torch.futures.Future[None] = torch.futures.Future()
                future.set_result(None)
                return future

        stored = {name: torch.full((3,), float(n)) for n, name in enumerate("abcd")}
        mapping = {"a": 1, "b": 2, "c": 3, "d": 3}
        dcp.save(stored, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), mapping))
        for kind in (Opening, ByHand):
            target = {name: torch.zeros(3) for name in "abcd"}
            dcp.load(target, storage_reader=kind(str(tmp_path), threads))
            assert [value.tolist() for value in target.values()] == [[n] * 3 for n in range(4)]
        assert len(Opening.opened) == 3
        with pytest.raises(CheckpointError, match="0 of 3 files of the plan were read"):
            dcp.load(target, storage_reader=Losing(str(tmp_path), threads))

    @pytest.mark.parametrize("threads", [1, 3])
    def test_a_failure_in_one_file_ends_the_others(self, tmp_path: Path, threads: int) -> None:
        class Failing(dcp.HuggingFaceStorageReader):
            def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
                if req.storage_index.fqn == "b":
                    raise OSError("no such shelf")
                super()._process_read_request(f, req, planner)

        stored = {name: torch.ones(3) for name in "abc"}
        mapping = {"a": 1, "b": 2, "c": 3}
        dcp.save(stored, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), mapping))
        with pytest.raises(OSError, match="no such shelf"):
            dcp.load(stored, storage_reader=Failing(str(tmp_path), threads))

    def test_a_subclass_of_the_quantised_reader_is_asked_too(self, tmp_path: Path) -> None:
        class Watching(dcp.QuantizedHuggingFaceStorageReader):
            asked: ClassVar[list[str]] = []

            def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
                self.asked.append(req.storage_index.fqn)
                super()._process_read_request(f, req, planner)

        stored = {
            "a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
            "a.weight_scale_inv": torch.full((1, 1), 2.0),
            "b": torch.arange(6.0).reshape(2, 3),
        }
        dcp.save(stored, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)))
        target = {"a.weight": torch.zeros(4, 4), "b": torch.zeros(2, 3)}
        dcp.load(target, storage_reader=Watching(str(tmp_path)))
        assert sorted(Watching.asked) == ["a.weight", "b"]
        assert target["a.weight"].tolist() == [[2.0] * 4] * 4
        assert target["b"].tolist() == stored["b"].tolist()


class Copied(FileSystemBase):
    """A file system that is no subclass of ours, with only the methods that torch requires."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Any:
        with open(path, mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> str:
        return os.path.join(path, suffix)

    def init_path(self, path: Any) -> str:
        return str(path)

    def rename(self, path: Any, new_path: Any) -> None:
        os.replace(path, new_path)

    def mkdir(self, path: Any) -> None:
        os.makedirs(path, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return os.path.exists(path)

    def rm_file(self, path: Any) -> None:
        os.remove(path)


@pytest.mark.parametrize("make", [Copied, TorchFileSystem, FileSystem])
def test_a_file_system_replacing_ours_is_used(
    tmp_path: Path, make: Callable[[], FileSystemBase]
) -> None:
    """As the storages of s3torchconnector and of object stores, which set `fs` and `path`."""
    writer, reader = dcp.FileSystemWriter(tmp_path / "x"), dcp.FileSystemReader(tmp_path / "x")
    for storage in (writer, reader):
        storage.fs = make()
        storage.path = storage.fs.init_path(str(tmp_path / "other"))
    dcp.save(state(), storage_writer=writer)
    target = blank()
    dcp.load(target, storage_reader=reader)
    check_loaded(target)
    assert not (tmp_path / "x").exists()


def test_a_path_of_text_is_taken_for_the_local_file_system(tmp_path: Path) -> None:
    writer, reader = dcp.FileSystemWriter(tmp_path), dcp.FileSystemReader(tmp_path)
    writer.path = reader.path = str(tmp_path / "deep" / "er")
    dcp.save(state(), storage_writer=writer)
    target = blank()
    dcp.load(target, storage_reader=reader)
    check_loaded(target)


class TestByHand:
    def test_torchs_order_of_calls_loads(self, saved: Path) -> None:
        reader, planner, target = dcp.FileSystemReader(saved), dcp.DefaultLoadPlanner(), blank()
        metadata = reader.read_metadata()
        planner.set_up_planner(target, metadata, True)
        reader.set_up_storage_reader(metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()
        check_loaded(target)

    def test_places_alone_are_enough(self, saved: Path) -> None:
        metadata = dcp.FileSystemReader(saved).read_metadata()
        planner, target = dcp.DefaultLoadPlanner(), blank()
        planner.set_up_planner(target, metadata, True)
        plan = planner.create_local_plan()
        reader = dcp.FileSystemReader(saved)
        reader.storage_data = dict(metadata.storage_data)
        reader.read_data(LoadPlan(list(plan.items)), planner).wait()
        check_loaded(target)

    def test_a_plan_of_an_entry_without_a_place_is_refused_by_name(self, saved: Path) -> None:
        planner, target = dcp.DefaultLoadPlanner(), blank()
        planner.set_up_planner(target, dcp.FileSystemReader(saved).read_metadata(), True)
        plan = planner.create_local_plan()
        with pytest.raises(CheckpointCorruptError, match="does not know the place") as caught:
            dcp.FileSystemReader(saved).read_data(plan, planner)
        assert caught.value.entry in blank()

    def test_places_that_are_put_in_later_count(self, saved: Path, tmp_path: Path) -> None:
        """As readers that point the places at copies of the files."""
        reader, planner, target = dcp.FileSystemReader(saved), dcp.DefaultLoadPlanner(), blank()
        metadata = reader.read_metadata()
        planner.set_up_planner(target, metadata, True)
        plan = planner.create_local_plan()
        reader.set_up_storage_reader(metadata, True)
        for index, place in list(reader.storage_data.items()):
            shutil.copy(saved / place.relative_path, saved / "copy.distcp")
            reader.storage_data[index] = _StorageInfo("copy.distcp", place.offset, place.length)
            (saved / place.relative_path).unlink(missing_ok=True)
            break
        reader.storage_data = {
            index: _StorageInfo("copy.distcp", place.offset, place.length)
            for index, place in reader.storage_data.items()
        }
        reader.read_data(plan, planner).wait()
        check_loaded(target)

    def test_files_of_safetensors_need_no_metadata(self, tmp_path: Path) -> None:
        dcp.save({"w": torch.arange(4.0)}, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path))
        (file,) = tmp_path.glob("*.safetensors")
        for name in (file.name, str(file)):
            reader = dcp.HuggingFaceStorageReader(tmp_path)
            index = MetadataIndex("w", torch.Size([0]))
            reader.storage_data = {index: _HFStorageInfo(name, torch.Size([4]), torch.float32)}
            metadata = dcp.HuggingFaceStorageReader(tmp_path).read_metadata()
            planner, target = dcp.DefaultLoadPlanner(), {"w": torch.zeros(4)}
            planner.set_up_planner(target, metadata)
            item = ReadItem(
                LoadItemType.TENSOR, index, torch.Size([0]), index, torch.Size([1]), torch.Size([3])
            )
            reader.read_data(LoadPlan([item]), planner).wait()
            assert target["w"].tolist() == [1, 2, 3, 0]


class Negated(StreamTransformExtension):
    """Every byte turned round."""

    class _Stream(io.RawIOBase):
        def __init__(self, raw: Any) -> None:
            self.raw = raw

        def writable(self) -> bool:
            return True

        def readable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.raw.write(bytes(255 - byte for byte in bytes(data)))
            return len(data)

        def readinto(self, buffer: Any) -> int:
            data = self.raw.read(len(buffer))
            buffer[: len(data)] = bytes(255 - byte for byte in data)
            return len(data)

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        stream: Any = self._Stream(output)
        return stream

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        stream: Any = io.BufferedReader(self._Stream(input))
        return stream

    def get_descriptor(self) -> str:
        return "negated"

    @staticmethod
    def registry_name() -> str:
        return "negated"

    @staticmethod
    def from_descriptor(version: str) -> Negated:
        return Negated()


def test_slices_pass_through_the_transforms_of_their_entries(tmp_path: Path) -> None:
    registry = ExtensionRegistry()
    registry.extensions["negated"] = Negated

    class Sliced(dcp.FileSystemReader):
        def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
            return super()._slice_file(file, sinfo)

    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[Negated()]))
    for make in (Sliced, dcp.FileSystemReader):
        target = blank()
        dcp.load(target, storage_reader=make(tmp_path, registry))
        check_loaded(target)
