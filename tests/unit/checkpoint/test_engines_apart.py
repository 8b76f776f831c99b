"""No storage or planner of torch's engine comes out of a module of ours, private names included."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from typing import Any

import pytest

import pytest_dcp.checkpoint as our_dcp
from pytest_dcp.checkpoint import _storage_utils

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


def modules() -> list[str]:
    """torch's modules that have a counterpart; see `test_torch_names` for the others."""
    names = (found.name for found in pkgutil.iter_modules(torch_dcp.__path__))
    return [
        name for name in names if importlib.util.find_spec(f"{our_dcp.__name__}.{name}") is not None
    ]


@pytest.mark.parametrize("name", modules())
def test_no_storage_or_planner_of_torchs_engine_comes_out(name: str) -> None:
    ours = importlib.import_module(f"{our_dcp.__name__}.{name}")
    theirs = importlib.import_module(f"{torch_dcp.__name__}.{name}")
    leaks = [
        one
        for one in vars(theirs)
        if not one.startswith("__")
        and inspect.isclass(found := getattr(ours, one))
        and issubclass(found, ENGINE_BASES)
        and found.__module__.startswith(torch_dcp.__name__)
        and one not in TORCHS_OWN
    ]
    assert leaks == []


def test_a_storage_is_set_up_as_torchs_private_function_does_it(tmp_path: Any) -> None:
    writer = _storage_utils._storage_setup(None, tmp_path)
    assert type(writer) is our_dcp.FileSystemWriter
    reader = _storage_utils._storage_setup(None, tmp_path, reader=True)
    assert type(reader) is our_dcp.FileSystemReader
    given = our_dcp.FileSystemReader(tmp_path / "one")
    assert _storage_utils._storage_setup(given, tmp_path / "two", reader=True) is given
    assert given.checkpoint_id == tmp_path / "two"
