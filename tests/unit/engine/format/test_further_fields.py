"""Fields that planners and frameworks add to a checkpoint's metadata are kept and do no harm."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner as TorchSavePlanner
from torch.distributed.checkpoint import FileSystemReader as TorchReader
from torch.distributed.checkpoint import FileSystemWriter as TorchWriter
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.checkpoint import save as torch_save
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem, WriteItemType

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.unpickle import read_metadata
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject, may_stay_unread
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def state() -> dict[str, Any]:
    return {"w": torch.arange(6.0), "m": {"b": torch.ones(2)}, "step": 7}


def check_loads(folder: Path) -> None:
    for load in (dcp.load, torch_of):
        target: dict[str, Any] = {"w": torch.zeros(6), "m": {"b": torch.zeros(2)}, "step": 0}
        load(target, checkpoint_id=folder)
        assert torch.equal(target["w"], torch.arange(6.0))
        assert torch.equal(target["m"]["b"], torch.ones(2))
        assert target["step"] == 7


def torch_of(target: dict[str, Any], checkpoint_id: Path) -> None:
    torch_load(target, storage_reader=TorchReader(checkpoint_id), no_dist=True)


@dataclass
class Settings:
    """A class of a framework, as far as the bounded reader knows."""

    lr: float


def adding(base: type, **fields: Any) -> Any:
    """A planner that sets these attributes on the metadata."""

    class Adding(base):  # type: ignore[misc]  # either engine's
        def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            for name, value in fields.items():
                setattr(metadata, name, all_plans if value is SavePlan else value)
            return plans, metadata

    return Adding()


def save_with_ours(folder: Path, **fields: Any) -> None:
    dcp.save(state(), checkpoint_id=folder, planner=adding(dcp.DefaultSavePlanner, **fields))


def save_with_torch(folder: Path, **fields: Any) -> None:
    planner = adding(TorchSavePlanner, **fields)
    torch_save(state(), storage_writer=TorchWriter(folder), planner=planner, no_dist=True)


@pytest.mark.parametrize("save", [save_with_ours, save_with_torch])
class TestAttributes:
    def test_plain_values_come_back(self, tmp_path: Path, save: Any) -> None:
        data = {"a": [1, (2.5, None)], "b": {3: b"x"}, "dtype": torch.bfloat16}
        save(tmp_path, of_mine=data, note="hello")
        check_loads(tmp_path)
        metadata: Any = dcp.FileSystemReader(tmp_path).read_metadata()
        assert metadata.of_mine == data
        assert metadata.note == "hello"
        assert vars(copy.copy(metadata)).keys() == vars(metadata).keys()
        stock: Any = TorchReader(tmp_path).read_metadata()
        assert stock.of_mine == data
        assert b"pytest_dcp.checkpoint" not in (tmp_path / ".metadata").read_bytes()

    def test_the_plans_of_all_ranks_come_back(self, tmp_path: Path, save: Any) -> None:
        """As Megatron-Core's `all_local_plans`."""
        save(tmp_path, all_local_plans=SavePlan)
        check_loads(tmp_path)
        ours: Any = dcp.FileSystemReader(tmp_path).read_metadata()
        stock: Any = TorchReader(tmp_path).read_metadata()
        assert ours.all_local_plans == stock.all_local_plans
        (plan,) = ours.all_local_plans
        assert isinstance(plan, SavePlan)
        assert type(plan.items) is list
        assert [type(item) for item in plan.items] == [WriteItem] * 3
        assert {item.index.fqn for item in plan.items} == {"w", "m.b", "step"}
        assert plan.items[0].type in WriteItemType
        assert plan.planner_data == stock.planner_data

    def test_other_objects_are_kept_aside(
        self, tmp_path: Path, save: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        save(tmp_path, mcore_data={"w": {"settings": Settings(0.5), "shape": (2, 3)}}, more=[1])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pytest_dcp.checkpoint"):
            check_loads(tmp_path)
        assert f"{__name__}.Settings" in caplog.text
        metadata: Any = dcp.FileSystemReader(tmp_path).read_metadata()
        found = metadata.mcore_data["w"]
        assert isinstance(found["settings"], UnreadObject)
        assert "Settings" in repr(found["settings"])
        assert not hasattr(found["settings"], "lr")
        assert found["shape"] == (2, 3)
        assert metadata.more == [1]


def test_the_result_of_save_and_metadata_saved_again_have_them(tmp_path: Path) -> None:
    planner = adding(dcp.DefaultSavePlanner, of_mine=[1, 2])
    made: Any = dcp.save(state(), checkpoint_id=tmp_path / "a", planner=planner)
    assert made.of_mine == [1, 2]
    writer = dcp.FileSystemWriter(tmp_path / "a")
    metadata: Any = dcp.FileSystemReader(tmp_path / "a").read_metadata()
    metadata.more = {"x": 1}
    data = metadata_file.encode(metadata.storage_data.catalog)
    assert read_metadata(b"".join(data)[: len(data[0])]).of_mine == [1, 2]  # type: ignore[attr-defined]  # the attribute
    assert writer.storage_meta() is not None
    again: Any = pickle.loads(pickle.dumps(metadata))
    assert (again.of_mine, again.more) == ([1, 2], {"x": 1})


def test_a_value_that_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match="pickle") as caught:
        save_with_ours(tmp_path, of_mine=lambda: None)
    assert "'of_mine'" in str(caught.value)
    assert not (tmp_path / ".metadata").exists()


def test_an_unread_object_is_not_written_again() -> None:
    with pytest.raises(TypeError, match=r"framework\.Thing was not read"):
        pickle.dumps(UnreadObject("framework.Thing"))


# ---- files of other writers


def metadata_of(folder: Path, **changes: Any) -> Any:
    torch_save(state(), storage_writer=TorchWriter(folder), no_dist=True)
    metadata: Any = TorchReader(folder).read_metadata()
    for name, value in changes.items():
        setattr(metadata, name, value)
    return metadata


def rewrite(folder: Path, metadata: Any, protocol: int = 4) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))


class Framework:
    """A module that is there while a file is written, and gone when it is read."""

    def __init__(self) -> None:
        self.module = ModuleType("some_framework")
        sys.modules["some_framework"] = self.module

    def define(self, name: str, *bases: type, **members: Any) -> Any:
        kind = type(name, bases or (object,), {**members, "__module__": "some_framework"})
        setattr(self.module, name, kind)
        return kind


@pytest.fixture
def framework() -> Any:
    made = Framework()
    yield made
    del sys.modules["some_framework"]


def load_ours(folder: Path) -> dict[str, Any]:
    target: dict[str, Any] = {"w": torch.zeros(6), "m": {"b": torch.zeros(2)}, "step": 0}
    dcp.load(target, checkpoint_id=folder)
    return target


ODD = {
    "an object": lambda f: f.define("Thing")(),
    "its fields": lambda f: _with_fields(f.define("Thing")()),
    "the class itself": lambda f: f.define("Thing"),
    "a list of its own": lambda f: f.define("Things", list)([1, 2, [3]]),
    "a dict of its own": lambda f: f.define("Table", dict)(a=1),
    "a set of its own": lambda f: f.define("Bag", set)([1, 2]),
    "made by a call": lambda f: f.define("Call", __reduce__=lambda self: (type(self), ()))(),
    "made with keywords": lambda f: f.define("Kw", str, __getnewargs_ex__=lambda _: (("x",), {}))(),
    "as a key": lambda f: {f.define("Key")(): 1},
    "in a key": lambda f: {("a", f.define("Key")()): 1},
    "in a set": lambda f: {f.define("Key")()},
    "a factory": lambda f: __import__("collections").defaultdict(f.define("Make"), a=1),
    "of the standard library": lambda _: SimpleNamespace(
        at=datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc), lr=0.5
    ),
}


def _with_fields(thing: Any) -> Any:
    thing.a, thing.b = [1, 2], {"c": thing}
    return thing


PLACES = [(odd, where) for odd in ODD for where in ("further", "planner_data")] + [
    (odd, where)
    for odd in ("an object", "its fields", "the class itself")
    for where in ("version", "storage_meta")
]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(("odd", "where"), PLACES)
def test_unknown_objects_do_not_stop_a_load(
    tmp_path: Path, framework: Framework, odd: str, where: str, protocol: int
) -> None:
    value = ODD[odd](framework)
    whole = where in ("version", "storage_meta")
    rewrite(tmp_path, metadata_of(tmp_path, **{where: value if whole else {"x": value}}), protocol)
    vars(framework.module).clear()
    assert torch.equal(load_ours(tmp_path)["w"], torch.arange(6.0))
    metadata: Any = dcp.FileSystemReader(tmp_path).read_metadata()
    if whole:
        assert not isinstance(getattr(metadata, where), UnreadObject)
    else:
        assert list(getattr(metadata, where)) == ["x"]


def test_an_unknown_place_stops_only_the_load_that_needs_it(
    tmp_path: Path, framework: Framework
) -> None:
    metadata = metadata_of(tmp_path)
    place = framework.define("Place")()
    metadata.storage_data = {
        key: place if key.fqn == "w" else info for key, info in metadata.storage_data.items()
    }
    rewrite(tmp_path, metadata)
    target: dict[str, Any] = {"m": {"b": torch.zeros(2)}, "step": 0}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["m"]["b"].tolist() == [1, 1]
    with pytest.raises(BaseException, match="'w'") as caught:
        load_ours(tmp_path)
    ((cause, _),) = caught.value.failures.values()  # type: ignore[attr-defined]  # a StepError
    assert isinstance(cause, CheckpointCorruptError)


def test_an_unknown_kind_of_key_is_as_if_it_were_not_there(
    tmp_path: Path, framework: Framework
) -> None:
    metadata = metadata_of(tmp_path)
    metadata.state_dict_metadata["w"] = framework.define("Storage")()
    rewrite(tmp_path, metadata)
    target: dict[str, Any] = {"m": {"b": torch.zeros(2)}, "step": 0}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["step"] == 7
    with pytest.raises(BaseException, match="Missing key"):
        load_ours(tmp_path)


def test_fields_of_a_later_torch_are_passed_over(tmp_path: Path) -> None:
    metadata = metadata_of(tmp_path)
    for entry in metadata.state_dict_metadata.values():
        entry.of_later = (1, "x")
    for key, info in metadata.storage_data.items():
        info.checksum = 5
        object.__setattr__(key, "of_later", None)
    meta: Any = metadata.storage_meta
    meta.of_later = [2]
    rewrite(tmp_path, metadata)
    assert torch.equal(load_ours(tmp_path)["w"], torch.arange(6.0))
    again: Any = dcp.FileSystemReader(tmp_path).read_metadata()
    assert again.storage_meta.of_later == [2]
    assert isinstance(again.storage_meta, StorageMeta)


def test_load_plans_and_prefixes_are_read() -> None:
    plan = SavePlan([], storage_data=_StoragePrefix("__3_"), planner_data={"a": ("a",)})
    metadata: Any = Metadata({})
    metadata.plans = [plan, LoadPlan([])]
    read: Any = read_metadata(pickle.dumps(metadata))
    assert read.plans == [plan, LoadPlan([])]


@pytest.mark.parametrize(
    ("module", "name", "stays"),
    [
        ("megatron.core.x", "Thing", True),
        ("__main__", "Config", True),
        ("argparse", "Namespace", True),
        ("torch.distributed.checkpoint.metadata", "OfLater", True),
        ("os", "system", False),
        ("builtins", "eval", False),
        ("__builtin__", "eval", False),
        ("subprocess", "Popen", False),
        ("torch", "load", False),
        ("torch.hub", "load", False),
        ("numpy", "load", False),
        ("numpy.testing._private.utils", "runstring", False),
        ("functools", "partial", False),
        ("megatron.core.x(y", "Thing", False),
        ("megatron..x", "Thing", False),
        ("megatron.core.x", "a b", False),
    ],
)
def test_a_global_that_an_attack_would_call_is_refused_as_ever(
    tmp_path: Path, module: str, name: str, stays: bool
) -> None:
    assert may_stay_unread(module, name) is stays
    data = pickle.dumps(metadata_of(tmp_path, further="here"), 4)
    named = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name)) + b"\x93"
    hostile = data.replace(b"\x8c\x04here", named + b"\x8c\x01a\x85R")
    # Frames of the right length would be longer.
    hostile = hostile[:2] + hostile[11:]
    if stays:
        assert isinstance(read_metadata(hostile).further, UnreadObject)  # type: ignore[attr-defined]  # the attribute
    else:
        with pytest.raises(UntrustedPickleError, match=name):
            read_metadata(hostile)


def test_shared_fields_pay_for_each_object_that_gets_them() -> None:
    """A state of many fields, given to one object after the other, must not fill the memory."""
    kind = "torch.distributed.checkpoint.planner"
    new = b"\x8c" + bytes([len(kind)]) + kind.encode() + b"\x8c\x08SavePlan\x93\x94"
    fields = b"".join(b"\x8c\x03a" + f"{n:02}".encode() + b"N" for n in range(99))
    data = b"\x80\x04" + new + b"}(" + fields + b"u\x94](" + b"h\x00)\x81h\x01b" * 40_000 + b"e."
    with pytest.raises(UntrustedPickleError, match="again and again"):
        read_metadata(data)


def test_a_further_field_without_end_is_kept_aside(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    rewrite(tmp_path, metadata_of(tmp_path, loop=loop, deep=deep, fine=3))
    assert load_ours(tmp_path)["step"] == 7
    metadata: Any = dcp.FileSystemReader(tmp_path).read_metadata()
    assert isinstance(metadata.loop, UnreadObject)
    assert isinstance(metadata.deep, UnreadObject)
    assert metadata.fine == 3


# ---- the stand-ins of what is read


class TestStandIns:
    def test_the_mappings_are_dicts_and_can_be_changed(self, tmp_path: Path) -> None:
        dcp.save(state(), checkpoint_id=tmp_path)
        metadata = dcp.FileSystemReader(tmp_path).read_metadata()
        stock = TorchReader(tmp_path).read_metadata()
        for name in ("state_dict_metadata", "planner_data", "storage_data"):
            mine, theirs = getattr(metadata, name), getattr(stock, name)
            assert isinstance(mine, dict)
            assert mine == theirs
            key = next(iter(theirs))
            mine[key] = theirs[key]
            assert mine.pop(key) == theirs.pop(key)
            assert mine == theirs
            assert key not in mine
            mine["x"] = 1
            del mine["x"]
            assert mine | {} == theirs
        chunks = getattr(metadata.state_dict_metadata["m.b"], "chunks", [])
        assert isinstance(chunks, list)

    def test_unwatched_places_take_no_time(self, tmp_path: Path) -> None:
        """A key for each is a third of what planning a load takes."""
        dcp.save(state(), checkpoint_id=tmp_path)
        metadata = dcp.FileSystemReader(tmp_path).read_metadata()
        assert Catalog.of(metadata).places is metadata.storage_data.catalog.places
        assert "row_of" not in vars(metadata.storage_data.catalog)

    def test_paths_go_to_json(self, tmp_path: Path) -> None:
        dcp.save(state(), checkpoint_id=tmp_path)
        data = dcp.FileSystemReader(tmp_path).read_metadata().planner_data
        assert json.loads(json.dumps(data)) == {"w": ["w"], "m.b": ["m", "b"], "step": ["step"]}

    def test_changed_metadata_are_loaded(self, tmp_path: Path) -> None:
        dcp.save(state(), checkpoint_id=tmp_path)
        reader, planner = dcp.FileSystemReader(tmp_path), dcp.DefaultLoadPlanner()
        metadata = reader.read_metadata()
        metadata.state_dict_metadata["v"] = metadata.state_dict_metadata.pop("w")
        (key,) = (key for key in metadata.storage_data if key.fqn == "w")
        moved = type(key)("v", key.offset, key.index)
        metadata.storage_data[moved] = metadata.storage_data.pop(key)
        target: dict[str, Any] = {"v": torch.zeros(6)}
        planner.set_up_planner(target, metadata, True)
        reader.set_up_storage_reader(metadata, True)
        reader.read_data(planner.create_local_plan(), planner).wait()
        assert torch.equal(target["v"], torch.arange(6.0))
        assert reader.filled.bytes_verified
