"""Copied as test_caller_errors.py: mistakes of the caller, failures in the caller's own code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pytest_dcp.checkpoint as dcp
from pytest_dcp._harness.controller.worlds_fixture import Worlds
from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.checkpoint.default_planner import DefaultLoadPlanner
from pytest_dcp.faults import NoSpace, recorded
from pytest_dcp.faults.storage import FaultyStorage
from pytest_dcp.properties import StateSpec, TensorSpec, assert_round_trip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
marked = pytest.mark.world_size(2)


def save_and_load(folder: Path, **keywords: Any) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    dcp.load({"other": torch.ones(3)}, checkpoint_id=folder, **keywords)


def test_missing_key(tmp_path: Path) -> None:
    save_and_load(tmp_path)


@marked
def test_missing_key_in_ranks(checkpoint_dir: Path) -> None:
    save_and_load(checkpoint_dir)


def test_missing_key_in_a_function(worlds: Worlds, tmp_path: Path) -> None:
    with worlds(2) as world:
        world.run(save_and_load, tmp_path)


def test_budget_in_a_function(worlds: Worlds) -> None:
    with worlds(2) as world:
        world.run(test_budget)


def test_damaged_file(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path)
    (tmp_path / ".metadata").write_bytes(b"no metadata")
    dcp.load({"w": torch.ones(3)}, checkpoint_id=tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    dcp.load({"w": torch.ones(3)}, checkpoint_id=tmp_path / "none")


def test_state_of_another_kind(tmp_path: Path) -> None:
    state: Any = [1]
    dcp.save(state, checkpoint_id=tmp_path)


def test_state_of_another_kind_in_the_background(tmp_path: Path) -> None:
    state: Any = [1]
    dcp.async_save(state, checkpoint_id=tmp_path)


def test_id_of_another_kind() -> None:
    folder: Any = 5
    dcp.load({"w": torch.ones(3)}, checkpoint_id=folder)


def test_background(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dcp.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "file" / "x").result()


def test_worlds_of_none(worlds: Worlds) -> None:
    with worlds(0):
        pass


def test_worlds_keyword(worlds: Worlds) -> None:
    with worlds(2, backnd="gloo"):
        pass


def test_worlds_rank(worlds: Worlds) -> None:
    with worlds(2) as world:
        world.kill(7)


@marked
def test_world_rank(world: RankWorld) -> None:
    world.kill(7)


@marked
def test_world_function(world: RankWorld) -> None:
    world.kill(0, at="no_such_package.module:function")


def test_inject(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(after_bytes=1), on="wirte_data")


@marked
def test_inject_in_ranks(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(after_bytes=1), on="wirte_data")


@marked
def test_never_fired(faulty_storage: FaultyStorage) -> None:
    faulty_storage.inject(NoSpace(after_bytes=1), on="write_data")


@marked
def test_another_state(faulty_storage: FaultyStorage, checkpoint_dir: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=checkpoint_dir)
    faulty_storage.assert_loads({"w": torch.zeros(3)})


def test_budget() -> None:
    recorded(lambda folder: (folder / "file").touch()).crash_states(budget="many")


def states() -> tuple[StateSpec, StateSpec]:
    return StateSpec({"w": TensorSpec((2,))}), StateSpec({"other": TensorSpec((2,))})


def test_law(tmp_path: Path) -> None:
    saved, loaded = states()
    assert_round_trip(saved.on(), loaded.on(), tmp_path)


@marked
def test_law_in_ranks(checkpoint_dir: Path) -> None:
    saved, loaded = states()
    assert_round_trip(saved.on(), loaded.on(), checkpoint_dir)


# Failures of the caller's own code, which the package calls.


class Planner(DefaultLoadPlanner):
    def create_local_plan(self) -> Any:
        return [].pop()


def test_own_planner(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path)
    dcp.load({"w": torch.ones(3)}, checkpoint_id=tmp_path, planner=Planner())


@pytest.fixture
def broken_fixture() -> Iterator[int]:
    yield 1
    raise ValueError("broken fixture")


@marked
def test_own_fixture(broken_fixture: int) -> None:
    pass


@marked
def test_library(rank: int) -> None:
    dist.get_rank(group=7)  # type: ignore[arg-type]  # that is the mistake


# A mistake of the package: all that led to it is shown.


def test_bug_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DefaultLoadPlanner, "create_local_plan", len)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path)
    dcp.load({"w": torch.ones(3)}, checkpoint_id=tmp_path)
