"""Tests in worlds, run as a user's are: the `world` fixture, the seeds, the device mesh.

Every rank runs every line of a marked test, so what is asserted here holds in each of them.
"""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pytest_dcp import DivergedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_dcp._harness.rank.world_fixture import RankWorld

LATE_S = 0.3
"""By how much a rank is held back; its peers take some milliseconds."""

pytestmark = pytest.mark.world_size(3, timeout=60)


# barrier.


def test_the_world_knows_its_rank_and_size(world: RankWorld, rank: int, world_size: int) -> None:
    assert (world.rank, world.size) == (rank, world_size)
    assert (world.rank, world.size) == (dist.get_rank(), dist.get_world_size())


def test_a_barrier_waits_for_the_last_rank(world: RankWorld, rank: int) -> None:
    world.barrier()
    started = time.monotonic()
    if rank == 1:
        time.sleep(LATE_S)
    world.barrier()
    assert time.monotonic() - started >= LATE_S / 2


def test_barriers_follow_each_other(world: RankWorld, rank: int) -> None:
    for turn in range(50):
        world.barrier()
        assert world.gather((turn, rank)) == [(turn, one) for one in range(3)]


def test_a_barrier_works_when_the_process_group_is_gone(world: RankWorld) -> None:
    dist.destroy_process_group()
    world.barrier()
    assert world.gather(1) == [1, 1, 1]


@pytest.mark.world_size(1)
def test_a_world_of_one_waits_for_no_peer(world: RankWorld) -> None:
    world.barrier()
    assert world.gather("alone") == ["alone"]
    assert world.broadcast("alone") == "alone"
    with world.rank0_first():
        world.barrier()


# gather and broadcast.


def test_gather_gives_every_rank_all_values_in_rank_order(world: RankWorld, rank: int) -> None:
    assert world.gather(rank * 10) == [0, 10, 20]


def test_gathered_values_are_of_any_picklable_kind(world: RankWorld, rank: int) -> None:
    double = world.gather(lambda value: value * (rank + 1))
    assert [function(10) for function in double] == [10, 20, 30]
    tensors = world.gather(torch.full((2,), rank))
    assert [tensor.tolist() for tensor in tensors] == [[0, 0], [1, 1], [2, 2]]


def test_large_values_are_gathered(world: RankWorld, rank: int) -> None:
    values = world.gather(bytes([rank]) * (5 << 20))
    assert [(len(value), value[0]) for value in values] == [(5 << 20, one) for one in range(3)]


@pytest.mark.parametrize("src", [0, 1, 2])
def test_broadcast_gives_the_value_of_its_source(world: RankWorld, rank: int, src: int) -> None:
    assert world.broadcast({"from": rank}, src=src) == {"from": src}


def test_broadcast_is_from_rank_0_by_default(world: RankWorld, rank: int) -> None:
    assert world.broadcast(rank) == 0


def test_only_the_source_has_to_give_a_value_that_can_be_pickled(
    world: RankWorld, rank: int
) -> None:
    assert world.broadcast("fine" if rank == 2 else threading.Lock(), src=2) == "fine"


@pytest.mark.parametrize("src", [-1, 3])
def test_broadcast_from_no_rank_is_an_error_in_every_rank(world: RankWorld, src: int) -> None:
    with pytest.raises(ValueError, match=rf"broadcast\(\): src must be from 0 to 2, got {src}"):
        world.broadcast("value", src=src)
    world.barrier()


# Ranks that do different things.


def test_ranks_that_ask_for_different_things_see_the_difference(
    world: RankWorld, rank: int
) -> None:
    said = r"different things \(rank 0: gather\(\), rank 1: barrier\(\), rank 2: barrier\(\)\)"
    if rank == 0:
        time.sleep(LATE_S)  # the others wait by then
    with pytest.raises(DivergedError, match=said):
        world.gather(1) if rank == 0 else world.barrier()


@pytest.mark.world_size(2)
def test_sources_that_differ_are_different_things(world: RankWorld, rank: int) -> None:
    with pytest.raises(DivergedError, match=r"broadcast\(src=0\), .*broadcast\(src=1\)"):
        world.broadcast(rank, src=rank)


@pytest.mark.world_size(2)
def test_a_rank_that_ended_is_not_waited_for(world: RankWorld, rank: int) -> None:
    if rank == 1:
        return
    with pytest.raises(
        DivergedError, match=r"cannot complete .*: rank 1 \(ended call\) will not come"
    ):
        world.barrier()


@pytest.mark.world_size(2)
def test_a_value_that_cannot_be_pickled_is_its_ranks_error(world: RankWorld, rank: int) -> None:
    if rank == 1:
        with pytest.raises(TypeError, match="cannot pickle"):
            world.gather(threading.Lock())
        return
    with pytest.raises(
        DivergedError, match=r"cannot complete .*: rank 1 \(ended call\) will not come"
    ):
        world.gather(1)


def test_an_error_leaves_the_world_of_use_to_ranks_in_step(world: RankWorld) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        world.gather(threading.Lock())
    assert world.gather(1) == [1, 1, 1]


# rank0_first.


def test_rank_0_goes_first(world: RankWorld, rank: int, checkpoint_dir: Path) -> None:
    made = checkpoint_dir / "made"
    with world.rank0_first():
        if rank == 0:
            time.sleep(LATE_S)
            made.write_text("by rank 0")
        assert made.read_text() == "by rank 0"


def come_first(world: RankWorld) -> None:
    """Rank 0 raises in its turn, so that no other may have one."""
    with world.rank0_first():
        if world.rank == 0:
            raise OSError("no network")
        pytest.fail("rank 0 has not been through")


def test_the_others_hear_that_rank_0_raised(world: RankWorld, rank: int) -> None:
    if rank == 0:
        with pytest.raises(OSError, match="no network"):
            come_first(world)
        return
    with pytest.raises(DivergedError, match=r"rank0_first\(\).*rank 0 \(ended call\)"):
        come_first(world)


def test_the_others_hear_that_rank_0_raised_and_went_on(world: RankWorld, rank: int) -> None:
    with pytest.raises(OSError if rank == 0 else DivergedError):
        come_first(world)
    if rank == 0:
        with pytest.raises(DivergedError, match=r"barrier\(\).*rank0_first\(\)"):
            world.barrier()


def test_another_rank_may_raise_after_rank_0(world: RankWorld, rank: int) -> None:
    def come_after() -> None:
        with world.rank0_first():
            if rank == 2:
                raise OSError("no disk")

    if rank == 2:
        with pytest.raises(OSError, match="no disk"):
            come_after()
    else:
        come_after()
    world.barrier()


# Seeds.


def draws() -> tuple[float, ...]:
    """A number of each source of randomness."""
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_every_rank_draws_the_same_numbers(world: RankWorld) -> None:
    assert len(set(world.gather(draws()))) == 1
    assert len(set(world.gather(world.seed))) == 1


def test_draws_go_on_alike(world: RankWorld) -> None:
    drawn = [draws() for _ in range(3)]
    assert len(set(drawn)) == 3
    assert world.gather(drawn) == [drawn] * 3


@pytest.fixture
def drawn_in_setup() -> tuple[float, ...]:
    return draws()


def test_fixtures_draw_alike_too(world: RankWorld, drawn_in_setup: tuple[float, ...]) -> None:
    assert len(set(world.gather(drawn_in_setup))) == 1
    assert drawn_in_setup != draws()


PROCESSES: set[int] = set()
DRAWN: list[tuple[float, ...]] = []
"""By the tests of a warm world, in each of its ranks."""


@pytest.mark.world_size(2, isolation="module")
@pytest.mark.parametrize("number", range(3))
def test_a_warm_world_is_seeded_for_every_test(world: RankWorld, number: int) -> None:
    PROCESSES.add(os.getpid())
    DRAWN.append(draws())
    assert len(PROCESSES) == 1
    assert len(set(DRAWN)) == len(DRAWN)
    assert len(set(world.gather(tuple(DRAWN)))) == 1


# The device mesh.


def test_a_mesh_has_one_dimension_by_default(device_mesh: DeviceMesh) -> None:
    assert device_mesh.mesh.tolist() == [0, 1, 2]
    assert device_mesh.device_type == "cpu"


@pytest.mark.world_size(4, mesh=(2, 2))
def test_a_mesh_is_filled_row_by_row(device_mesh: DeviceMesh, rank: int) -> None:
    assert device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert tuple(device_mesh.get_coordinate() or ()) == (rank // 2, rank % 2)
    assert device_mesh.mesh_dim_names is None


@pytest.mark.world_size(4, mesh=(2, 2), mesh_dim_names=("dp", "tp"))
def test_dimensions_have_the_names_they_were_given(device_mesh: DeviceMesh, rank: int) -> None:
    assert device_mesh.mesh_dim_names == ("dp", "tp")
    total = torch.tensor(rank)
    dist.all_reduce(total, group=device_mesh.get_group("dp"))
    assert total.item() == rank % 2 * 2 + 2


@pytest.mark.world_size(4, mesh=(1, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
def test_a_mesh_may_have_three_dimensions(device_mesh: DeviceMesh) -> None:
    assert device_mesh.shape == (1, 2, 2)
    assert device_mesh["tp"].size() == 2


@pytest.mark.world_size(2, mesh=[2], mesh_dim_names=["all"])
def test_shape_and_names_may_be_lists(device_mesh: DeviceMesh) -> None:
    assert device_mesh.shape == (2,)
    assert device_mesh.mesh_dim_names == ("all",)


# The mesh of a warm world.


class TestWarmMesh:
    """Run in order, in one world: a test may depend on the previous one."""

    pytestmark = pytest.mark.world_size(3, isolation="module")
    seen: ClassVar[list[DeviceMesh]] = []

    def test_is_made_by_the_first_test(self, device_mesh: DeviceMesh) -> None:
        self.seen.append(device_mesh)

    def test_is_shared_by_the_next(self, device_mesh: DeviceMesh) -> None:
        assert device_mesh is self.seen[0]
        dist.destroy_process_group()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", rank=rank, world_size=size)

    def test_is_made_anew_for_a_new_process_group(self, device_mesh: DeviceMesh) -> None:
        assert device_mesh is not self.seen[0]
        assert device_mesh.get_group() is dist.group.WORLD
        total = torch.ones(1)
        dist.all_reduce(total, group=device_mesh.get_group())
        assert total.item() == 3
