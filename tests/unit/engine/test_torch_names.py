"""Names available after importing torch's modules are available after importing ours.

Compared with the torch that is installed, name by name, in the package and in every module of torch
that has a counterpart.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as our_dcp
from pytest_dcp.checkpoint import state_dict_loader, state_dict_saver
from support.torch_surface import OURS, TORCH, modules_of_torch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

torch_dcp: Any = importlib.import_module(TORCH)


def test_we_have_every_module_of_torchs() -> None:
    found = modules_of_torch()
    assert len(found) >= 40
    assert [one for one in found if importlib.util.find_spec(f"{OURS}.{one}") is None] == []


def both(module: str) -> tuple[Any, Any]:
    path = f".{module}" if module else ""
    return importlib.import_module(TORCH + path), importlib.import_module(OURS + path)


def named(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def test_importing_our_package_brings_every_name_that_importing_torchs_brings() -> None:
    """In a process of its own, where nothing else has imported a part of either."""
    script = (
        "import importlib; theirs = vars(importlib.import_module('torch.distributed.checkpoint'));"
        "import pytest_dcp.checkpoint as ours;"
        "print(len(theirs) > 40);"
        "print(*[n for n in list(theirs) if not n.startswith('__') and not hasattr(ours, n)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize("module", modules_of_torch())
def test_every_name_of_a_module_is_there(module: str) -> None:
    theirs, ours = both(module)
    assert [name for name in named(theirs) if not hasattr(ours, name)] == []


@pytest.mark.parametrize("module", ["", *modules_of_torch()])
def test_a_class_that_we_have_never_comes_out_as_torchs(module: str) -> None:
    theirs, ours = both(module)
    for name, value in named(theirs).items():
        home = str(getattr(value, "__module__", None))
        if not inspect.isclass(value) or home.removeprefix(f"{TORCH}.") not in modules_of_torch():
            continue
        own = vars(importlib.import_module(home.replace(TORCH, OURS)))
        assert getattr(ours, name) is own.get(name, value), name


@pytest.mark.parametrize("name", ["staging", "stateful", "planner_helpers", "state_dict", "utils"])
def test_modules_that_we_have_are_attributes_of_the_package(name: str) -> None:
    assert getattr(our_dcp, name) is importlib.import_module(f"{OURS}.{name}")


def test_a_module_that_only_a_newer_torch_has_is_an_attribute_of_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newer = ModuleType(f"{TORCH}.newer")
    monkeypatch.setattr(torch_dcp, "newer", newer, raising=False)
    assert our_dcp.newer is newer


def test_names_from_elsewhere_are_ours_where_we_have_them() -> None:
    (_, utils), (_, hf_storage), (theirs, saver) = map(
        both, ("utils", "hf_storage", "state_dict_saver")
    )
    assert utils.CheckpointException is our_dcp.CheckpointException
    assert hf_storage.FileSystemReader is our_dcp.FileSystemReader
    assert saver.DefaultSavePlanner is our_dcp.DefaultSavePlanner is not theirs.DefaultSavePlanner


@pytest.mark.parametrize("module", ["", "utils", "filesystem"])
def test_a_name_that_neither_has_is_no_attribute(module: str) -> None:
    _, ours = both(module)
    with pytest.raises(AttributeError, match=rf"{ours.__name__}.*no attribute 'no_such_name'"):
        ours.no_such_name  # noqa: B018 - asking is the test
    assert not hasattr(ours, "__wrapped__")


def test_private_verbs_are_our_engines(tmp_path: Any) -> None:
    state = {"a": torch.arange(4.0)}
    writer = our_dcp.FileSystemWriter(tmp_path)
    metadata: Any = state_dict_saver._save_state_dict(state, writer, no_dist=True)
    assert metadata.storage_meta.save_id[:12] in next(tmp_path.glob("*.distcp")).name
    loaded = {"a": torch.zeros(4)}
    reader = our_dcp.FileSystemReader(tmp_path)
    state_dict_loader._load_state_dict(loaded, reader, no_dist=True)
    assert torch.equal(loaded["a"], state["a"])


VALUE_TYPES = {
    "state_dict": ["StateDictOptions"],
    "state_dict_saver": ["AsyncCheckpointerType", "AsyncSaveResponse"],
    "staging": ["StagingOptions", "AsyncStager"],
    "filesystem": ["SerializationFormat", "FileSystemBase"],
    "stateful": ["Stateful"],
    "planner": ["SavePlan", "LoadPlan", "WriteItem", "ReadItem", "WriteItemType", "LoadItemType"],
    "metadata": ["Metadata", "TensorProperties", "StorageMeta"],
}


@pytest.mark.parametrize("module", VALUE_TYPES)
def test_values_are_of_torchs_own_types(module: str) -> None:
    theirs, ours = both(module)
    for name in VALUE_TYPES[module]:
        assert getattr(ours, name) is getattr(theirs, name)


@pytest.mark.parametrize("module", modules_of_torch())
def test_our_classes_count_as_torchs_of_the_same_name(module: str) -> None:
    theirs, ours = both(module)
    for name, value in named(theirs).items():
        if inspect.isclass(value) and value.__module__ == theirs.__name__ and name[0] != "_":
            found = getattr(ours, name)
            assert found is value or issubclass(found, value), name


def test_an_unknown_kind_of_background_save_is_refused(tmp_path: Any) -> None:
    kind: Any = "fibre"
    with pytest.raises(ValueError, match="'fibre' is not a valid AsyncCheckpointerType"):
        our_dcp.async_save(
            {"a": torch.ones(1)}, checkpoint_id=tmp_path, no_dist=True, async_checkpointer_type=kind
        )


def test_a_report_unpacks_as_the_missing_and_the_unexpected_keys(tmp_path: Any) -> None:
    our_dcp.save({"a": torch.ones(1), "b": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"a": torch.zeros(1), "c": torch.zeros(3)}
    report = our_dcp.load(state, checkpoint_id=tmp_path, no_dist=True, strict=False)
    missing_keys, unexpected_keys = report
    assert (missing_keys, unexpected_keys) == (["c"], ["b"])
    assert (report.missing_keys, report.unexpected_keys) == (["c"], ["b"])
