"""FSDP: a sharded training step, saved by a world of four and loaded by a world of two."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from pytest_dcp.demo.model import FEATURES, MLP


def build(model):
    """The model, sharded over all ranks, and its optimizer."""
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_step(model, optimizer, batch):
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def full_state(model, optimizer):
    """The unsharded states of model and optimizer on rank 0, empty ones elsewhere. Collective."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True
    )
    return get_state_dict(model, optimizer, options=options)


def train_and_save(folder):
    """Train one step in this rank and save. Returns the full state saved."""
    model, optimizer = build(MLP())
    train_step(model, optimizer, torch.randn(4, FEATURES))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return full_state(model, optimizer)


def load(folder):
    """Resume in this rank. Returns the full state loaded."""
    model, optimizer = build(MLP())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return full_state(model, optimizer)


@pytest.mark.world_size(4)
def test_a_sharded_step_equals_a_plain_one():
    plain = MLP()
    sharded, optimizer = build(copy.deepcopy(plain))
    batch = torch.randn(4, FEATURES)

    train_step(plain, torch.optim.AdamW(plain.parameters(), lr=0.1), batch)
    train_step(sharded, optimizer, batch)

    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), plain.get_parameter(name))


def test_four_ranks_save_and_two_load(worlds, tmp_path):
    with worlds(4) as four:
        saved, *_ = four.run(train_and_save, tmp_path)
    with worlds(2) as two:
        loaded, *_ = two.run(load, tmp_path)

    _, optimizer_state = saved
    assert optimizer_state["state.up.weight.exp_avg"].any(), "the step left no trace to load"
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
