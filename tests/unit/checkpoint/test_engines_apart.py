"""No storage or planner of torch's engine comes out of a module of ours, private names included."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import types
from typing import Any

import pytest

import pytest_dcp.checkpoint as our_dcp
from pytest_dcp.checkpoint import _storage_utils
from support.torch_surface import modules_of_torch, surface

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")

ENGINE_BASES = (
    torch_dcp.StorageReader,
    torch_dcp.StorageWriter,
    torch_dcp.SavePlanner,
    torch_dcp.LoadPlanner,
)
TORCHS_OWN = {
    "StorageReader",
    "StorageWriter",
    "SavePlanner",
    "LoadPlanner",
    "BlockingAsyncStager",
    "_ReaderWithOffset",
}
"""Abstract bases, which are the protocol of both engines, and a planner for FSDP1."""


@pytest.mark.parametrize("name", modules_of_torch())
def test_no_storage_or_planner_of_torchs_engine_comes_out(name: str) -> None:
    ours = importlib.import_module(f"{our_dcp.__name__}.{name}")
    theirs = importlib.import_module(f"{torch_dcp.__name__}.{name}")
    leaks = [
        one
        for one in vars(theirs)
        if not one.startswith("__")
        and inspect.isclass(found := getattr(ours, one))
        and not isinstance(found, types.GenericAlias)  # a class only to Python 3.10
        and issubclass(found, ENGINE_BASES)
        and found.__module__.startswith(torch_dcp.__name__)
        and one not in TORCHS_OWN
    ]
    assert leaks == []


PURE = {
    "_dedup_save_plans": ["dedup_save_plans"],
    "_dedup_tensors": ["dedup_tensors", "init_logger"],
    "_extension": ["ExtensionRegistry", "ZStandard"],
    "_hf_utils": ["_gen_file_name"],
    "_nested_dict": ["flatten_state_dict", "unflatten_state_dict"],
    "_traverse": [
        "get_element", "print_tensor", "set_element", "traverse_state_dict",
        "traverse_state_dict_v_2_3",
    ],
    "api": ["_wrap_exception"],
    "default_planner": ["_create_default_local_metadata", "_validate_global_plan"],
    "filesystem": ["_item_size"],
    "planner": ["LoadPlanner"],
    "planner_helpers": [
        "_compare_save_plans", "_create_chunk_from_tensor", "_create_default_metadata_only_plan",
        "_create_read_item_for_tensor", "_create_write_item_for_tensor", "_init_state_dict",
        "_merge_delta_local_plans",
    ],
    "state_dict": ["_init_optim_state"],
    "utils": ["_DistWrapper", "_api_bc_check", "_create_file_view", "_get_failure_dict"],
}  # fmt: skip
"""Functions and classes that are torch's own in our modules: they read and write nothing, and take
and give values that both engines share. Our engine calls none of them."""
PARTS_OF_TORCHS_ENGINE = {
    # torch's background process, for libraries that build their own from it; ours has others.
    "_async_process_executor": ["_AsyncCheckpointProcess"],
    # Private, undocumented, and imported by no library that we have found.
    "staging": ["_ReplicationStager"],
}


@pytest.mark.parametrize("name", modules_of_torch())
def test_functions_and_classes_that_stay_torchs_are_listed(name: str) -> None:
    """Types of values, enumerations, protocols and abstract classes are torch's in any case."""
    theirs = importlib.import_module(f"{torch_dcp.__name__}.{name}")
    ours = importlib.import_module(f"{our_dcp.__name__}.{name}")
    stay = {one for one in surface(theirs) if getattr(ours, one) is getattr(theirs, one)}
    stay = {one for one in stay if _does_something(getattr(theirs, one), theirs.__name__)}
    assert stay <= {*PURE.get(name, ()), *PARTS_OF_TORCHS_ENGINE.get(name, ())}


def _does_something(value: Any, module: str) -> bool:
    """Whether it is a function of the module, or a class with more than values and a contract."""
    if getattr(value, "__module__", None) != module:
        return False
    if not inspect.isclass(value):
        return inspect.isfunction(value)
    is_value = dataclasses.is_dataclass(value) or issubclass(value, enum.Enum | BaseException)
    return not (is_value or inspect.isabstract(value) or getattr(value, "_is_protocol", False))


def test_a_storage_is_set_up_as_torchs_private_function_does_it(tmp_path: Any) -> None:
    writer = _storage_utils._storage_setup(None, tmp_path)
    assert type(writer) is our_dcp.FileSystemWriter
    reader = _storage_utils._storage_setup(None, tmp_path, reader=True)
    assert type(reader) is our_dcp.FileSystemReader
    given = our_dcp.FileSystemReader(tmp_path / "one")
    assert _storage_utils._storage_setup(given, tmp_path / "two", reader=True) is given
    assert given.checkpoint_id == tmp_path / "two"
