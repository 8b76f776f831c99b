"""Wrapped storages, planners and stagers behave as before, except for hooks with faults."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults import HOOKS, FaultyStorageWriter
from pytest_dcp.faults.injection.hook_wrappers import Wrappers

BASES = {
    "writer": StorageWriter,
    "reader": StorageReader,
    "save_planner": SavePlanner,
    "load_planner": LoadPlanner,
    "stager": AsyncStager,
}


class Noting:
    """Notes every hook and lets it do its work."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        self.names.append(name)
        return call()


def wrappers() -> tuple[Wrappers, Noting]:
    noting = Noting()
    return Wrappers(noting), noting


@pytest.mark.parametrize("role", HOOKS)
def test_every_public_hook_of_torch_s_bases_is_known(role: str) -> None:
    public = {
        name
        for name, member in vars(BASES[role]).items()
        if not name.startswith("_")
        and (callable(member) or isinstance(member, property | classmethod))
    }
    assert set(HOOKS[role]) == public


def test_there_are_as_many_hooks_as_torch_has() -> None:
    assert [len(HOOKS[role]) for role in HOOKS] == [8, 7, 5, 8, 4]


def test_a_wrapped_object_is_of_its_class_and_shares_its_attributes(tmp_path: Path) -> None:
    wrapping, _ = wrappers()
    inner = dcp.FileSystemWriter(tmp_path, thread_count=3)
    outer = wrapping.wrap(inner, "writer")
    assert isinstance(outer, dcp.FileSystemWriter)
    assert outer.thread_count == 3
    outer.save_id = "x"
    assert inner.save_id == "x"
    inner.thread_count = 5
    assert outer.thread_count == 5


def test_only_hooks_that_a_fault_is_at_are_overridden(tmp_path: Path) -> None:
    wrapping, _ = wrappers()
    outer = wrapping.wrap(dcp.FileSystemReader(tmp_path), "reader")
    assert type(outer).prepare_global_plan is dcp.FileSystemReader.prepare_global_plan
    wrapping.target({"reader.prepare_global_plan", "writer.finish"})
    assert type(outer).prepare_global_plan is not dcp.FileSystemReader.prepare_global_plan
    assert type(outer).read_data is dcp.FileSystemReader.read_data
    assert "finish" not in vars(type(outer))
    later = wrapping.wrap(dcp.FileSystemReader(tmp_path), "reader")
    assert type(later).prepare_global_plan is not dcp.FileSystemReader.prepare_global_plan


@pytest.mark.parametrize("role", HOOKS)
def test_every_hook_passes_with_its_arguments_result_and_signature(role: str) -> None:
    class Plain:
        pass

    def hook(name: str) -> Any:
        def body(self: Any, first: Any, second: Any = 2, **kwargs: Any) -> Any:
            return name, first, second, kwargs

        body.__name__ = name
        return body

    kind: Any = type("Plain", (), {name: hook(name) for name in HOOKS[role]})
    wrapping, noting = wrappers()
    outer = wrapping.wrap(kind(), role)
    wrapping.target({f"{role}.{name}" for name in HOOKS[role]})
    for name in HOOKS[role]:
        assert getattr(outer, name)(1, kept=3) == (name, 1, 2, {"kept": 3})
        assert inspect.signature(getattr(type(outer), name)) == inspect.signature(
            getattr(kind, name)
        )
    assert noting.names == [f"{role}.{name}" for name in HOOKS[role]]


def test_a_hook_that_an_object_calls_on_itself_is_no_event() -> None:
    class Delegating(FaultyStorageWriter):
        def reset(self, checkpoint_id: Any = None) -> None:
            self.storage_meta()

    wrapping, noting = wrappers()
    wrapping.target({"writer.reset", "writer.storage_meta"})
    wrapping.wrap(Delegating({}), "writer").reset()
    assert noting.names == ["writer.reset"]


def test_the_property_of_a_stager_is_a_hook_too() -> None:
    class Stager:
        _synchronize_after_execute = True
        should_synchronize_after_execute = True

        def stage(self, state_dict: Any) -> Any:
            return state_dict

        def synchronize_staging(self) -> None:
            pass

        def close(self) -> None:
            pass

    wrapping, noting = wrappers()
    wrapping.target({"stager.should_synchronize_after_execute"})
    stager: Any = Stager()
    outer: Any = wrapping.wrap(stager, "stager")
    assert isinstance(outer, AsyncStager)
    assert outer.should_synchronize_after_execute is True
    stager.should_synchronize_after_execute = False
    assert outer.should_synchronize_after_execute is False
    assert noting.names == ["stager.should_synchronize_after_execute"] * 2


def test_classes_with_slots_and_abstract_bases_are_wrapped() -> None:
    class Base(ABC):
        __slots__ = ()

        @abstractmethod
        def finish(self) -> int: ...

    class Slotted(Base):
        __slots__ = ("kept",)
        kept: int

        def finish(self) -> int:
            return self.kept

    wrapping, noting = wrappers()
    wrapping.target({"writer.finish"})
    inner: Any = Slotted()
    inner.kept = 4
    assert wrapping.wrap(inner, "writer").finish() == 4
    assert noting.names == ["writer.finish"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_wrapper_with_targets_saves_and_loads_as_the_plain_one_does(tmp_path: Path) -> None:
    wrapping, noting = wrappers()
    wrapping.target({f"{role}.{name}" for role in HOOKS for name in HOOKS[role]})
    target: dict[str, Any] = {"w": torch.zeros(3), "epoch": 0}
    dcp.save(
        {"w": torch.ones(3), "epoch": 1},
        storage_writer=wrapping.wrap(dcp.FileSystemWriter(tmp_path), "writer"),
        planner=wrapping.wrap(dcp.DefaultSavePlanner(), "save_planner"),
    )
    dcp.load(
        target,
        storage_reader=wrapping.wrap(dcp.FileSystemReader(tmp_path), "reader"),
        planner=wrapping.wrap(dcp.DefaultLoadPlanner(), "load_planner"),
    )
    assert target["epoch"] == 1
    assert torch.equal(target["w"], torch.ones(3))
    for name in ("writer.write_data", "save_planner.resolve_data", "load_planner.commit_tensor"):
        assert name in noting.names
