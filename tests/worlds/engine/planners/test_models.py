"""Models and optimizers that are sharded the ways people shard them: TP, FSDP2, HSDP, and both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pytest_dcp.checkpoint as dcp
from support.states import blank, same, torch_dcp

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


class Net(torch.nn.Module):
    """Few of its sizes can be divided by the number of ranks."""

    def __init__(self, device: str = "cpu", hidden: int = 12) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net1 = torch.nn.Linear(5, hidden, device=device)
        self.net2 = torch.nn.Linear(hidden, 15, device=device)
        self.net3 = torch.nn.Linear(15, 1, device=device)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net3(self.net2(torch.relu(self.net1(x))))
        return out


TP = {"net1": ColwiseParallel(), "net2": RowwiseParallel()}
UNEVEN_TP = {**TP, "net3": ColwiseParallel()}


def tensor_parallel(model: Net, plan: Any) -> Net:
    assert parallelize_module(model, init_device_mesh("cpu", (4,)), copy.deepcopy(plan)) is model
    return model


def fsdp(model: Net) -> Net:
    fully_shard(model.net2)
    fully_shard(model)
    return model


def hsdp(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.net2, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def both(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], copy.deepcopy(TP))
    fully_shard(model.net1, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return model


def plain(model: Net) -> Net:
    return model


WAYS = [plain, fsdp, hsdp, both]


def whole(state: Any) -> Any:
    """The state with every DTensor gathered: torch's own collectives are the oracle."""
    if isinstance(state, DTensor):
        return state.redistribute(placements=[Replicate()] * state.device_mesh.ndim).to_local()
    if isinstance(state, dict):
        return {key: whole(inner) for key, inner in state.items()}
    return state


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(3, 5)).sum().backward()
        optimizer.step()
        model.steps += 1  # type: ignore[operator,assignment]  # a buffer


def test_a_tensor_parallel_model_is_put_back(checkpoint_dir: Path) -> None:
    model = tensor_parallel(Net(), TP)
    before = copy.deepcopy(model.state_dict())
    dcp.save(before, checkpoint_id=checkpoint_dir)
    train(model, torch.optim.SGD(model.parameters(), lr=0.25))
    state = model.state_dict()
    assert not same(dict(state), dict(before))
    dcp.load(state, checkpoint_id=checkpoint_dir)
    assert same(dict(state), dict(before))
    assert same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("engine", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_a_tensor_parallel_model_is_loaded_from_the_meta_device(
    checkpoint_dir: Path, engine: Any
) -> None:
    saved = {"model": tensor_parallel(Net(hidden=10), UNEVEN_TP).state_dict()}
    engine.save(saved, checkpoint_id=checkpoint_dir)
    model = tensor_parallel(Net("meta", 10), UNEVEN_TP)
    inner = model.state_dict()
    target = {"model": inner}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["model"] is inner
    assert all(value.device.type == "cpu" for value in inner.values())
    assert same(dict(inner), dict(saved["model"]))
    assert all(
        value.device_mesh == saved["model"][name].device_mesh
        for name, value in inner.items()
        if isinstance(value, DTensor)
    )
    model.load_state_dict(inner, assign=True)
    assert same(dict(model.state_dict()), dict(saved["model"]))


def test_plain_meta_tensors_are_made_wherever_they_are(checkpoint_dir: Path) -> None:
    state = {"w": torch.ones(2), "list": [torch.ones(3), {"deep": torch.ones(1)}]}
    dcp.save(state, checkpoint_id=checkpoint_dir)
    target: dict[str, Any] = {
        "w": torch.empty(2, device="meta"),
        "list": [torch.empty(3, device="meta"), {"deep": torch.empty(1, device="meta")}],
    }
    inner = target["list"]
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, state)
    assert target["list"] is inner


@pytest.mark.parametrize("way", WAYS)
def test_a_model_and_its_optimizer_are_put_back_in_any_way(
    checkpoint_dir: Path, way: Callable[[Net], Net]
) -> None:
    model = way(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, steps=2)
    state, optim_state = get_state_dict(model, optimizer)
    saved = {"model": state, "optim": optim_state}
    expected = whole(saved)
    dcp.save(saved, checkpoint_id=checkpoint_dir / "ours")
    torch_dcp.save(saved, checkpoint_id=checkpoint_dir / "torchs")
    for folder in ("ours", "torchs"):
        for other_way in WAYS:
            other = other_way(Net())
            torch.nn.init.zeros_(other.net1.weight)
            other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.7)
            state, optim_state = get_state_dict(other, other_optimizer)
            target: dict[str, Any] = {"model": state, "optim": optim_state}
            dcp.load(target, checkpoint_id=checkpoint_dir / folder)
            assert near(whole(target), expected), (folder, other_way.__name__)
            set_state_dict(
                other,
                other_optimizer,
                model_state_dict=target["model"],
                optim_state_dict=target["optim"],
            )
            assert other_optimizer.param_groups[0]["lr"] == 0.1


def near(one: Any, other: Any) -> bool:
    """The same, whatever the order of keys: groups of parameters are ordered by each way."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list) and one and isinstance(one[0], dict):
        return all(near(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, list):
        return sorted(one) == sorted(other)
    return same(one, other)


def test_training_goes_on_as_if_nothing_had_been(checkpoint_dir: Path) -> None:
    model, other = fsdp(Net()), both(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer)
    state, optim_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optim": optim_state}, checkpoint_id=checkpoint_dir)
    train(model, optimizer, steps=2)

    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.05)
    state, optim_state = get_state_dict(other, other_optimizer)
    target: dict[str, Any] = {"model": state, "optim": optim_state}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=target["model"],
        optim_state_dict=target["optim"],
    )
    train(other, other_optimizer, steps=2)
    for name, value in whole(get_model_state_dict(model)).items():
        torch.testing.assert_close(whole(get_model_state_dict(other))[name], value)


def test_an_hsdp_checkpoint_is_read_without_ranks(checkpoint_dir: Path) -> None:
    model = hsdp(Net())
    state = get_model_state_dict(model)
    dcp.save({"model": state}, checkpoint_id=checkpoint_dir)
    single = Net()
    options = StateDictOptions(full_state_dict=True)
    target = {"model": blank(get_model_state_dict(single, options=options))}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.load(target, checkpoint_id=checkpoint_dir, no_dist=True)
    set_model_state_dict(single, target["model"])
    assert same(dict(single.state_dict()), whole(state))


def test_an_fsdp_model_on_the_meta_device_is_loaded(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    saved = fsdp(Net()).state_dict()
    dcp.save({"model": saved}, checkpoint_id=checkpoint_dir)
    model = fsdp(Net("meta"))
    target = {"model": model.state_dict()}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(dict(target["model"]), dict(saved))
    model.load_state_dict(target["model"], assign=True)
    assert same(dict(model.state_dict()), dict(saved))
