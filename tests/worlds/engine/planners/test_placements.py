"""Layouts: a state saved in one loads in any other, by the same or another number of ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import pytest_dcp.checkpoint as dcp
from support.states import blank, numbered, pairs, same, spread, torch_dcp

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds

FLAT = [(Shard(0),), (Shard(1),), (Replicate(),)]
SQUARE = list(product([Shard(0), Shard(1), Replicate()], repeat=2))
CUBE = [
    (Shard(0), Shard(1), Replicate()),
    (Replicate(), Shard(0), Shard(0)),
    (Shard(1), Replicate(), Shard(0)),
    (Shard(1), Shard(1), Shard(0)),
]


def title(placements: tuple[Placement, ...]) -> str:
    return " ".join(map(str, placements))


def laid_out(full: torch.Tensor, mesh: DeviceMesh, layouts: list[Any]) -> dict[str, DTensor]:
    return {title(layout): spread(full, mesh, *layout) for layout in layouts}


def crossed(folder: Path, full: torch.Tensor, mesh: DeviceMesh, layouts: list[Any]) -> None:
    """Every layout saved, and loaded in every layout, from our files and from torch's."""
    saved = laid_out(full, mesh, layouts)
    dcp.save(saved, checkpoint_id=folder / "ours")
    torch_dcp.save(saved, checkpoint_id=folder / "torchs")
    expected = {f"{title(a)} -> {title(b)}": spread(full, mesh, *b) for a, b in pairs(layouts)}
    names = {f"{title(a)} -> {title(b)}": title(a) for a, b in pairs(layouts)}
    for which in ("ours", "torchs"):
        target = blank(expected)
        dcp.load(target, checkpoint_id=folder / which, rename=names)
        assert same(target, expected), which
    for layout in layouts:
        target = {title(a): blank(spread(full, mesh, *layout)) for a in layouts}
        torch_dcp.load(target, checkpoint_id=folder / "ours")
        assert all(same(value, spread(full, mesh, *layout)) for value in target.values()), layout


@pytest.mark.world_size(4, isolation="module")
class TestMeshes:
    @pytest.mark.parametrize("shape", [(8, 8), (7, 5), (3, 2), (1, 9), (0, 4)])
    def test_any_layout_is_loaded_in_any_other(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, shape: tuple[int, int]
    ) -> None:
        crossed(checkpoint_dir, numbered(*shape), device_mesh, FLAT)

    @pytest.mark.parametrize("shape", [(8, 4), (5, 3)])
    def test_any_layout_on_two_dimensions_is_loaded_in_any_other(
        self, checkpoint_dir: Path, shape: tuple[int, int]
    ) -> None:
        crossed(checkpoint_dir, numbered(*shape), init_device_mesh("cpu", (2, 2)), SQUARE)

    def test_meshes_of_other_shapes_meet(self, checkpoint_dir: Path) -> None:
        full = numbered(9, 7)
        flat = init_device_mesh("cpu", (4,))
        square = init_device_mesh("cpu", (2, 2))
        state = laid_out(full, square, SQUARE)
        dcp.save(state, checkpoint_id=checkpoint_dir)
        for layout in FLAT:
            target = {name: blank(spread(full, flat, *layout)) for name in state}
            dcp.load(target, checkpoint_id=checkpoint_dir)
            assert all(same(value, spread(full, flat, *layout)) for value in target.values())
        whole = {name: blank(full) for name in state}
        dcp.load(whole, checkpoint_id=checkpoint_dir)
        assert all(same(value, full) for value in whole.values())

    def test_the_bytes_of_replicas_are_written_once_and_by_all(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        state = {str(n): spread(numbered(1024), device_mesh, Replicate()) for n in range(8)}
        metadata = dcp.save(state, checkpoint_id=checkpoint_dir)
        assert [
            len(value.chunks)
            for value in metadata.state_dict_metadata.values()
            if isinstance(value, dcp.TensorStorageMetadata)
        ] == [1] * 8
        sizes = [path.stat().st_size for path in checkpoint_dir.glob("*.distcp")]
        assert len(sizes) == 4
        assert max(sizes) < 2 * 4096 + 4096

    def test_a_tensor_on_part_of_the_ranks_is_saved_and_loaded(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        full = numbered(6, 4)
        left, right = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])

        def local(mesh: DeviceMesh, fill: bool) -> DTensor:
            mine = full.chunk(2)[mesh.mesh.tolist().index(rank)] if rank in mesh.mesh else full[:0]
            mine = mine.clone() if fill else torch.zeros_like(mine)
            return DTensor.from_local(
                mine, mesh, [Shard(0)], shape=full.shape, stride=full.stride(), run_check=False
            )

        dcp.save(
            {"left": local(left, True), "right": local(right, True)}, checkpoint_id=checkpoint_dir
        )
        target = {"left": local(right, False), "right": local(left, False)}
        dcp.load(target, checkpoint_id=checkpoint_dir)
        assert same(target["left"].to_local(), local(right, True).to_local())
        assert same(target["right"].to_local(), local(left, True).to_local())
        whole = {"left": torch.zeros(6, 4), "right": torch.zeros(6, 4)}
        torch_dcp.load(whole, checkpoint_id=checkpoint_dir)
        assert torch.equal(whole["left"], full)
        assert torch.equal(whole["right"], full)

    def test_a_dimension_of_a_mesh_is_a_mesh(self, checkpoint_dir: Path) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        full = numbered(5, 4)
        state = {name: spread(full, mesh[name], Shard(0)) for name in ("dp", "tp")}
        dcp.save(state, checkpoint_id=checkpoint_dir)
        for engine in (dcp, torch_dcp):
            target = {name: blank(spread(full, mesh[name], Shard(1))) for name in ("dp", "tp")}
            engine.load(target, checkpoint_id=checkpoint_dir)
            expected = {name: spread(full, mesh[name], Shard(1)) for name in ("dp", "tp")}
            assert same(target, expected), engine.__name__

    @pytest.mark.parametrize("rows", [8, 12])
    def test_a_strided_shard_is_placed_as_sharding_again_has_it(
        self, checkpoint_dir: Path, rows: int
    ) -> None:
        mesh = init_device_mesh("cpu", (2, 2))
        full = numbered(rows, 3)
        state = {"w": strided(full, mesh)}
        dcp.save(state, checkpoint_id=checkpoint_dir)
        for engine in (dcp, torch_dcp):
            whole = {"w": torch.zeros(rows, 3)}
            engine.load(whole, checkpoint_id=checkpoint_dir)
            assert torch.equal(whole["w"], full), engine.__name__
        target = {"w": blank(strided(full, mesh))}
        dcp.load(target, checkpoint_id=checkpoint_dir)
        assert same(target, state)

    @pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 9, 10, 11])
    def test_an_uneven_strided_shard_survives(self, checkpoint_dir: Path, rows: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2))
        full = numbered(rows, 3)
        state = {"w": strided(full, mesh)}
        dcp.save(state, checkpoint_id=checkpoint_dir / "strided")
        whole = {"w": torch.zeros(rows, 3)}
        dcp.load(whole, checkpoint_id=checkpoint_dir / "strided")
        assert torch.equal(whole["w"], full)
        dcp.save({"w": full}, checkpoint_id=checkpoint_dir / "whole")
        for folder in ("strided", "whole"):
            target = {"w": blank(strided(full, mesh))}
            place = target["w"].to_local().data_ptr()
            dcp.load(target, checkpoint_id=checkpoint_dir / folder)
            assert same(target, state), folder
            assert target["w"].to_local().data_ptr() == place


def strided(full: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """Rows first for tensor parallelism (the mesh's second dimension), then each part for FSDP.

    The oracle is that order itself, on the full tensor.
    """
    dp, tp = mesh.get_coordinate() or (0, 0)
    mine = chunk_of(chunk_of(full, mesh.shape[1], tp), mesh.shape[0], dp).clone()
    placements = [_StridedShard(0, split_factor=mesh.shape[1]), Shard(0)]
    return DTensor.from_local(
        mine, mesh, placements, shape=full.shape, stride=full.stride(), run_check=False
    )


def chunk_of(tensor: torch.Tensor, count: int, which: int) -> torch.Tensor:
    """As torch.chunk, with empty chunks at the end."""
    step = -(-len(tensor) // count)
    return tensor[which * step : (which + 1) * step]


@pytest.mark.world_size(8, mesh=(2, 2, 2))
def test_three_dimensions_of_a_mesh(checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
    crossed(checkpoint_dir, numbered(9, 6), device_mesh, CUBE)


STEPS = (4, 2, 3, 1)


def test_worlds_of_other_sizes_meet(worlds: Worlds, checkpoint_dir: Path) -> None:
    full, odd = numbered(7, 5), numbered(3, 2, start=100)

    def state() -> dict[str, Any]:
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (size,))
        return {
            "rows": spread(full, mesh, Shard(0)),
            "columns": spread(full, mesh, Shard(1)),
            "odd": spread(odd, mesh, Shard(0)),
            "replica": spread(full, mesh, Replicate()),
            "plain": full.clone(),
            "value": {"step": 3},
        }

    def step(before: Path | None, after: Path) -> str:
        target = state()
        if before is not None:
            target = blank(target)
            dcp.load(target, checkpoint_id=before)
            assert same(target, state())
        dcp.save(target, checkpoint_id=after)
        torch_dcp.load(other := blank(target), checkpoint_id=after)
        assert same(other, state())
        return "done"

    before = None
    for size in STEPS:
        after = checkpoint_dir / str(size)
        with worlds(size) as world:
            assert world.run(step, before, after) == ["done"] * size
        before = after


def test_a_strided_layout_of_four_ranks_is_read_by_three(
    worlds: Worlds, checkpoint_dir: Path
) -> None:
    fulls = {str(rows): numbered(rows, 2) for rows in (8, 7, 5, 3, 2)}

    def save() -> None:
        mesh = init_device_mesh("cpu", (2, 2))
        dcp.save({k: strided(v, mesh) for k, v in fulls.items()}, checkpoint_id=checkpoint_dir)

    def load() -> bool:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        expected = {k: spread(v, mesh, Shard(0)) for k, v in fulls.items()}
        target = blank(expected)
        dcp.load(target, checkpoint_id=checkpoint_dir)
        return same(target, expected)

    for size, run in ((4, save), (3, load)):
        with worlds(size) as world:
            assert world.run(run) in ([None] * 4, [True] * 3)
