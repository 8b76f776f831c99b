"""The fixtures that tests ask for. In a rank they describe the rank; `worlds` starts further
worlds.

Fixtures that last as long as a rank's process are session-scoped, so that fixtures of any scope may
use them. No torch at import: a suite without worlds pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_dcp._harness.controller.worlds_fixture import Worlds
    from pytest_dcp._harness.rank.this_rank import Rank
    from pytest_dcp._harness.rank.world_fixture import RankWorld


def _rank_of(request: pytest.FixtureRequest) -> Rank:
    from pytest_dcp._harness.rank.this_rank import current

    rank = current()
    if rank is None:
        pytest.fail(
            f"the fixture {request.fixturename!r} exists inside a world: mark the test with "
            "@pytest.mark.world_size(n)",
            pytrace=False,
        )
    return rank


@pytest.fixture(scope="session")
def rank(request: pytest.FixtureRequest) -> int:
    """This process's rank, 0 to world_size - 1.

    ```python
    @pytest.mark.world_size(2)
    def test_sum_over_ranks(rank, world_size):
        ones = torch.ones(2) * rank
        dist.all_reduce(ones)
        assert ones.tolist() == [1.0, 1.0] and world_size == 2
    ```
    """
    return _rank_of(request).order.view[0]


@pytest.fixture(scope="session")
def local_rank(request: pytest.FixtureRequest) -> int:
    """This process's rank on its node; equal to `rank`, except in a session under a launcher of
    several nodes.
    """
    return _rank_of(request).order.local_rank


@pytest.fixture(scope="session")
def world_size(request: pytest.FixtureRequest) -> int:
    """The number of ranks."""
    return _rank_of(request).order.view[1]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """This rank's device: cpu, or the GPU that was leased to it."""
    import torch

    return torch.device(_rank_of(request).order.device)


@pytest.fixture(scope="session")
def device_mesh(request: pytest.FixtureRequest) -> DeviceMesh:
    """A DeviceMesh over all ranks, of the marker's `mesh` shape; collective.

    The tests of a warm world share it until one makes another default process group.

        @pytest.mark.world_size(4, mesh=(2, 2))
        def test_a_rank_holds_half_of_the_rows(device_mesh):
            whole = torch.arange(8.0).reshape(4, 2)
            sharded = distribute_tensor(whole, device_mesh, [Replicate(), Shard(0)])
            assert sharded.to_local().shape == (2, 2)
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from pytest_dcp._harness.rank.this_rank import WarmMesh
    from pytest_dcp._pytest_internals import this_fixture

    rank = _rank_of(request)
    order, group = rank.order, dist.group.WORLD
    if order.threads:  # each thread makes its own when the test is called
        return None  # type: ignore[return-value]
    if rank.mesh is not None and rank.mesh.group is group:
        shared: DeviceMesh = rank.mesh.mesh
        return shared
    device_type = order.device.partition(":")[0]
    mesh = init_device_mesh(device_type, order.mesh, mesh_dim_names=order.mesh_dim_names)
    definition = this_fixture(request)
    rank.mesh = WarmMesh(group, mesh, forget=lambda: definition.finish(request))
    return mesh


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> RankWorld:
    """This rank's view of its world: barrier, broadcast, gather, rank0_first, seed; kill, pause.

    Deaths and stops requested with `kill(at=)` and `pause(at=)` must happen before the running test
    is torn down.

        @pytest.mark.world_size(3)
        def test_survivors_go_on(rank, world):
            if rank == 0:
                world.kill(2)
            assert world.gather(rank * 10) == [0, 10, None]
            assert world.survivors == (0, 1)
    """
    from pytest_dcp._harness.rank.world_fixture import RankWorld

    rank = _rank_of(request)
    if rank.order.is_simulated:
        pytest.fail(
            "the fixture 'world' is for ranks in processes of their own: in a world with "
            f"backend={rank.order.backend!r} there is one, and no other to meet, kill or pause",
            pytrace=False,
        )
    one = RankWorld(rank)
    rank.unmet.append(one.disarm)
    return one


@pytest.fixture
def checkpoint_dir(request: pytest.FixtureRequest) -> Path:
    """An empty folder, the same in every rank; in a test without a world, below its tmp_path.

    Kept or removed after the test as tmp_path is (tmp_path_retention_policy), by the controller,
    when every rank is gone.

        @pytest.mark.world_size(2)
        def test_a_checkpoint_of_two_ranks(rank, checkpoint_dir):
            dcp.save({"w": torch.ones(2), "rank": dcp.PerRank(rank)}, checkpoint_id=checkpoint_dir)
            saved = dcp.load_without_template(checkpoint_id=checkpoint_dir)
            assert sorted(saved["rank"].values()) == [0, 1]
    """
    from pytest_dcp._harness.rank.this_rank import current

    one = current()
    if one is None:
        tmp_path: Path = request.getfixturevalue("tmp_path")
        folder = tmp_path / "checkpoint"
    else:
        one.require_shared_folder()
        folder = Path(one.checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def worlds(request: pytest.FixtureRequest) -> Iterator[Worlds]:
    """Starts worlds inside one test: `with worlds(4) as w: results = w.run(function, *args)`.

    ```python
    def test_save_on_two_ranks_load_on_three(worlds, tmp_path):
        def save():
            dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path / "checkpoint")

        def load():
            state = {"w": torch.zeros(6)}
            dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
            return state["w"].sum().item()

        with worlds(2) as two:
            two.run(save)
        with worlds(3) as three:
            assert three.run(load) == [15.0] * 3
    ```
    """
    from pytest_dcp._harness.controller.session import harness_of
    from pytest_dcp._harness.controller.worlds_fixture import Worlds

    started = Worlds(harness_of(request.config), request.node.nodeid)
    try:
        yield started
    finally:
        started.close()
