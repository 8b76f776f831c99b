"""`pytest_dcp.simulate`: its answers, and its refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

import pytest_dcp
import pytest_dcp.checkpoint as dcp
from pytest_dcp import Simulation, simulate
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.manifest_columns import encode, encoded_length
from pytest_dcp._engine.format.metadata_pickle import pickle_metadata, pickled_length
from pytest_dcp._engine.plan.placement_boxes import local_boxes
from pytest_dcp._engine.simulation.layouts import layout_of
from pytest_dcp._engine.simulation.mesh_ranks import MeshRanks
from pytest_dcp.properties.meshes import MeshSpec, meshes
from pytest_dcp.properties.placements import Layout, layouts


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_rows_are_divided_and_copies_written_once() -> None:
    found = simulate(4, {"w": [Shard(0)]}, {"w": meta(10, 4), "b": meta(8), "step": 3})
    assert found.size == 4
    assert found.keys == 3
    assert found.chunks == 4 + 1 + 1
    assert found.held_bytes[0] - found.held_bytes[3] == 3 * 4 * 4 - 1 * 4 * 4
    assert found.items.sum() == found.chunks
    assert found.files.tolist() == [1, 1, 1, 1]


def test_the_slowest_rank_is_the_one_that_writes_most() -> None:
    found = simulate(4, {"w": [Shard(0)]}, {"w": meta(5000, 4)})
    assert found.slowest_rank == 0
    uneven = simulate(3, None, lambda rank: {f"w{rank}": meta(1000 * (rank + 1))})
    assert uneven.slowest_rank == 2
    assert uneven.save_s(disk_bytes_per_s=1e6) > uneven.save_s(disk_bytes_per_s=1e9)


def test_planner_options_count() -> None:
    state = {f"w{n}": meta(1000) for n in range(8)}
    balanced = simulate(4, None, state)
    lowest = simulate(
        4, None, state, planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    )
    assert balanced.items.tolist() == [2, 2, 2, 2]
    assert lowest.items.tolist() == [8, 0, 0, 0]


def test_the_ranks_asked_for_are_listed() -> None:
    found = simulate((2, 2), {"w": [Replicate(), Shard(0)]}, {"w": meta(4, 2)}, ranks=[3, 1])
    assert sorted(found.plans) == [1, 3]
    assert [tuple(item.index.offset) for item in found.plans[3].local_items] == [(2, 0)]
    (file,) = found.plans[3].files
    assert file.name == "__3_0-000000000000.distcp"
    assert file.nbytes == found.file_bytes[3]


def test_patterns_and_functions_place_tensors() -> None:
    state = {"layers": {"0": {"w": meta(8, 8), "b": meta(8)}, "1": {"w": meta(8, 8), "b": meta(8)}}}
    by_pattern = simulate(4, {"layers.*.w": [Shard(0)], "layers.1.w": [Shard(1)]}, state)

    def place(fqn: str, tensor: torch.Tensor) -> list[Placement] | None:
        if tensor.ndim == 1:
            return None
        return [Shard(1)] if ".1." in fqn else [Shard(-2)]

    by_function = simulate(4, place, state)
    assert by_pattern.chunks == by_function.chunks == 4 + 4 + 1 + 1
    assert by_pattern.file_bytes.tolist() == by_function.file_bytes.tolist()


def test_a_value_of_each_rank_has_a_name_of_each_rank() -> None:
    found = simulate(12, None, {"rng": dcp.PerRank(meta(16)), "step": 1}, ranks=[11])
    assert found.keys == 13
    assert found.plans[11].local_items[0].index.fqn == "rng.rank_11_of_12"


def test_the_result_prints_its_totals() -> None:
    text = str(simulate(8, [Shard(0)], {"w": meta(64, 64)}))
    assert text.startswith("8 ranks, 1 keys in 8 chunks, 8 data files\nwrites ")
    assert "coordinator: 7 connections" in text


def test_a_coordinator_that_is_too_small_is_reported_in_sentences() -> None:
    found = simulate(2048, [Shard(0)], {"w": meta(2048, 2)})
    assert found.problems(memory_bytes=1 << 40, open_files=1 << 20) == []
    few, small = found.problems(memory_bytes=1000, open_files=1024)
    assert "needs 2,047 connections and may open 1,024 files" in few
    assert "of memory or more, and has 0.0 GB" in small


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ((), "a mesh is a number of ranks"),
        ((2, 0), "a mesh is a number of ranks"),
        (-1, "a mesh is a number of ranks"),
        (True, "a mesh is a number of ranks"),
        ("22", "a mesh is a number of ranks"),
        (1 << 20, "a mesh of 1,048,576 ranks cannot be simulated"),
    ],
)
def test_a_mesh_that_cannot_be_simulated_is_refused(mesh: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(mesh, None, {})


@pytest.mark.parametrize(
    ("placements", "words"),
    [
        ([Shard(0), Shard(0)], "has 2 placements .* and the mesh .* has 1 dimensions"),
        ([Shard(2)], "shards dimension 2"),
        ({"v": [Shard(0)]}, "no tensor of the state is called 'v'"),
        (["row"], "has the placement 'row', which cannot be simulated"),
    ],
)
def test_placements_that_do_not_fit_are_refused(placements: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(4, placements, {"w": meta(4, 4)})


@pytest.mark.parametrize("ranks", [[4], [-1], [0, "1"], [True]])
def test_ranks_outside_the_world_are_refused(ranks: Any) -> None:
    with pytest.raises(ValueError, match="ranks= takes ranks from 0 to 3; got"):
        simulate(4, None, {}, ranks=ranks)


def test_states_that_no_save_takes_are_refused() -> None:
    with pytest.raises(pytest_dcp.PlanError, match=r"'w' .* holds a pending reduction"):
        simulate(4, [Partial()], {"w": meta(4)})
    with pytest.raises(pytest_dcp.PlanError, match="invalid fill"):
        simulate(2, [Shard(0)], lambda rank: {"w": meta(4)} if rank else {})
    with pytest.raises(pytest_dcp.PlanError, match="another size"):
        simulate(2, None, lambda rank: {"w": meta(4 + rank)})


def test_another_planner_is_refused() -> None:
    class Own(dcp.DefaultSavePlanner):
        pass

    for planner in (Own(), dcp.DefaultSavePlanner(enable_plan_caching=True)):
        with pytest.raises(ValueError, match="cannot be simulated: a DefaultSavePlanner without"):
            simulate(4, None, {}, planner=planner)


@given(mesh=st.integers(1, 24).flatmap(meshes), data=st.data())
def test_boxes_are_those_of_each_rank(mesh: MeshSpec, data: st.DataObject) -> None:
    layout = data.draw(layouts(mesh).filter(lambda one: one.placements is not None))
    size = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    placements = Layout(mesh, layout.placements).fit(len(size))
    found = layout_of(size, placements, MeshRanks.of(mesh.shape))
    for rank in range(mesh.size):
        coordinate = mesh.coordinate(rank)
        assert coordinate is not None
        boxes = local_boxes(size, mesh.shape, coordinate, placements)
        count = int(found.count[found.kind[rank]])
        offsets = [tuple(row) for row in found.offset[rank, :count].tolist()]
        shapes = [tuple(row) for row in found.shape[found.kind[rank], :count].tolist()]
        assert list(zip(offsets, shapes, strict=True)) == [(b.offset, b.shape) for b in boxes]


@pytest.mark.parametrize("keys", [0, 1, 999, 1000, 1001, 2500])
def test_lengths_of_metadata_are_those_of_its_bytes(keys: int) -> None:
    state = {
        f"w{n}": meta(3, 2) if n % 3 else (n if n % 2 else meta(2**n % 7)) for n in range(keys)
    }
    catalogs: list[Catalog] = []

    def keep(catalog: Catalog) -> int:
        catalogs.append(catalog)
        return pickled_length(catalog)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_dcp._engine.simulation.simulate.pickled_length", keep)
        simulate(3, lambda fqn, tensor: [Shard(0)] if tensor.ndim == 2 else None, state)
    (catalog,) = catalogs
    assert len(pickle_metadata(catalog)) == pickled_length(catalog)
    assert len(encode(catalog)) == encoded_length(catalog)


def test_lengths_count_numbers_of_eight_bytes() -> None:
    big = {"w": meta(1 << 33, dtype=torch.int8), "v": meta(3)}
    found = simulate(2, [Shard(0)], big)
    assert found.file_bytes[0] > 1 << 32
    assert isinstance(found, Simulation)


def test_a_thousand_ranks_differ_only_in_their_rows() -> None:
    state = {f"layers.{n}.w": meta(4096, 8) for n in range(20)}
    found = simulate(1024, [Shard(0)], state)
    assert len(set(found.file_bytes.tolist())) == 1
    plan, write = found.steps
    assert len(set(plan.to_coordinator[1:].tolist())) == 1
    assert np.all(write.from_coordinator[1:] == write.largest_bytes)


def test_without_a_simulation_its_code_is_not_imported() -> None:
    code = (
        "import sys, pytest_dcp, pytest_dcp.checkpoint\n"
        "assert not any('simulation' in name for name in sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_storage_meta_counts_with_its_length() -> None:
    short = simulate(2, None, {"w": meta(2)}, checkpoint_id="a")
    long = simulate(2, None, {"w": meta(2)}, checkpoint_id="a" * 200)
    assert long.metadata_bytes > short.metadata_bytes
