"""State dicts sent from one rank to others: as they were, in place, and never as code."""

from __future__ import annotations

from collections import OrderedDict
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _shard
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from pytest_dcp.checkpoint._pg_transport import PGTransport
from support.states import numbered, same, spread

pytestmark = pytest.mark.world_size(3, isolation="module")
CPU = torch.device("cpu")


def transport(state_dict: Any = None) -> PGTransport:
    group = dist.group.WORLD
    assert group is not None
    return PGTransport(group, timedelta(seconds=60), CPU, state_dict)


def exchanged(state: Any, template: Any = None) -> Any:
    """Rank 0 sends and returns its state; the others return the state they received."""
    way = transport(None if template is None else lambda: template)
    if dist.get_rank() == 0:
        way.send_checkpoint([1, 2], state)
        return state
    return way.recv_checkpoint(0)


def state() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "model": OrderedDict(w=torch.randn(3, 4), t=torch.randn(2, 3).t(), b=torch.ones(2).half()),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.uint16),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "optim": {"state": {0: {"step": 3, "exp": torch.randn(5)}}, "lr": [0.1, (1, 2)]},
        "name": "run",
        "none": None,
        "dtype": torch.bfloat16,
    }


def test_tensors_and_values_arrive_as_they_were() -> None:
    received = exchanged(state())
    assert same(received, state())
    assert type(received["model"]) is OrderedDict
    assert received["parameter"].requires_grad


def test_a_receiver_fills_the_tensors_that_it_has() -> None:
    here = {
        "model": OrderedDict(w=torch.zeros(3, 4), t=torch.zeros(2, 3).t(), b=torch.zeros(7)),
        "optim": {"state": {0: {"exp": torch.zeros(5)}}},
    }
    before = dict(here["model"]) | here["optim"]["state"][0]
    received = exchanged(state(), here)
    assert same(received, state())
    if dist.get_rank():
        assert received["model"]["w"] is before["w"]
        assert received["model"]["t"] is before["t"]  # not contiguous: copied
        assert received["model"]["b"] is not before["b"]  # of another shape
        assert received["optim"]["state"][0]["exp"] is before["exp"]


def test_the_part_of_a_dtensor_arrives_with_its_layout(device_mesh: DeviceMesh) -> None:
    mine = spread(numbered(5, 2), device_mesh, Shard(0))
    received = exchanged({"w": mine, "r": spread(numbered(3), device_mesh, Replicate())})
    assert isinstance(received["w"], DTensor)
    assert received["w"].placements == (Shard(0),)
    assert received["w"].shape == (5, 2)
    assert received["w"].stride() == mine.stride()
    assert received["w"].device_mesh.mesh.tolist() == [0, 1, 2]
    assert received["w"].device_mesh.mesh_dim_names == device_mesh.mesh_dim_names
    assert torch.equal(received["w"].to_local(), numbered(5, 2)[:2])  # rank 0's rows
    assert torch.equal(received["r"].to_local(), numbered(3))


def test_a_dtensor_is_filled_in_place(device_mesh: DeviceMesh) -> None:
    here = spread(torch.zeros(6, 2), device_mesh, Shard(0))
    received = exchanged({"w": spread(numbered(6, 2), device_mesh, Shard(0))}, {"w": here})
    if dist.get_rank():
        assert received["w"] is here
        assert torch.equal(here.to_local(), numbered(6, 2)[:2])


@pytest.mark.parametrize("like", ["placements", "shape"])
def test_a_dtensor_of_another_layout_is_not_filled(device_mesh: DeviceMesh, like: str) -> None:
    """Its own part may have the same shape as the sender's, and hold other elements."""
    sent = spread(numbered(2, 3), device_mesh, Replicate())
    here = spread(torch.zeros(2, 3), device_mesh, Replicate())
    if like == "shape":
        here = spread(torch.zeros(6, 3), device_mesh, Shard(0))
    else:
        sent = DTensor.from_local(numbered(2, 3), device_mesh, [Partial()])
    received = exchanged({"w": sent}, {"w": here})["w"]
    assert received.placements == sent.placements
    assert received.shape == sent.shape
    assert torch.equal(received.to_local(), numbered(2, 3))
    if dist.get_rank():
        assert received is not here
        assert not here.to_local().any()


def test_a_tensor_with_a_lazy_conjugate_is_filled() -> None:
    """Its memory holds the conjugates of its elements."""
    here = torch.zeros(3, dtype=torch.complex64).conj()
    values = torch.tensor([1 + 2j, 3j, 4], dtype=torch.complex64)
    received = exchanged({"z": values}, {"z": here})["z"]
    assert torch.equal(received, values)
    if dist.get_rank():
        assert received is here


@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_the_shards_of_a_sharded_tensor_arrive(in_place: bool) -> None:
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/cpu" for rank in range(3)])
    made = _shard.sharded_tensor.full(spec, (6, 2), fill_value=float(dist.get_rank() + 5))
    template = {"s": made} if in_place else None
    received = exchanged({"s": made}, template)["s"]
    (shard,) = received.local_shards()
    assert torch.equal(shard.tensor, torch.full((2, 2), 5.0))
    assert received.metadata().size == (6, 2)
    if in_place:
        assert received is made


@pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")
def test_a_sharded_tensor_that_is_cut_otherwise_is_not_filled() -> None:
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/cpu" for rank in range(3)])
    sent = _shard.sharded_tensor.full(spec, (6, 2), fill_value=5.0)
    here = _shard.sharded_tensor.full(spec, (5, 2), fill_value=1.0)
    received = exchanged({"s": sent}, {"s": here})["s"]
    assert received.metadata().size == (6, 2)
    if dist.get_rank():
        assert received is not here
        assert all((shard.tensor == 1).all() for shard in here.local_shards())


class Code:
    """Whose pickle runs code where it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exit, (3,)


def test_a_value_that_is_no_plain_data_is_refused_before_anything_is_sent() -> None:
    if dist.get_rank() == 0:
        with pytest.raises(TypeError, match=r"Code cannot be sent to another rank"):
            transport().send_checkpoint([1, 2], {"w": torch.ones(2), "code": Code()})
        with pytest.raises(TypeError, match="more than its elements"):
            transport().send_checkpoint([1, 2], {"s": torch.eye(3).to_sparse()})
    received = exchanged({"w": torch.ones(2)})
    assert torch.equal(received["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("lengths", "text"),
    [([0], "got 1 lengths"), ([2, -1, 5], "description of at most"), ([1, 3], "expected a value")],
)
def test_a_peer_that_sends_something_else_is_refused(lengths: list[int], text: str) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    if rank == 0:
        sent = torch.tensor(lengths, dtype=torch.int64)
        dist.send(torch.tensor([sent.numel()]), 1, tag=1)
        if len(lengths) > 1:
            dist.send(sent, 1, tag=1)
        if text.startswith("expected a value"):
            dist.send(torch.tensor(list(b"{x}"), dtype=torch.uint8), 1, tag=2)
    elif rank == 1:
        with pytest.raises(ValueError, match=text):
            transport().recv_checkpoint(0)


@pytest.mark.world_size(2)
def test_a_rank_that_does_not_send_is_waited_for_until_the_timeout() -> None:
    if dist.get_rank() == 1:
        group = dist.group.WORLD
        assert group is not None
        way = PGTransport(group, timedelta(milliseconds=200), CPU)
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            way.recv_checkpoint(0)
