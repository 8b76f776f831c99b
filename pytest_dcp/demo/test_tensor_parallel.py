"""Tensor parallelism: a sharded model against the plain one, and its checkpoints resharded."""

import copy

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from pytest_dcp.demo.model import FEATURES, HIDDEN, MLP


def shard(model, device_mesh):
    return parallelize_module(
        model, device_mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def full_state(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


@pytest.mark.world_size(2)
def test_sharded_mlp_computes_the_same_as_the_plain_one(device_mesh):
    # No broadcast: all ranks are seeded alike, so each builds the same weights and the same batch.
    plain = MLP()
    sharded = shard(copy.deepcopy(plain), device_mesh)
    assert sharded.up.weight.to_local().shape == (HIDDEN // 2, FEATURES)

    batch = torch.randn(4, FEATURES)
    expected, actual = plain(batch), sharded(batch)
    torch.testing.assert_close(actual, expected)

    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(sharded.up.weight.grad.full_tensor(), plain.up.weight.grad)


@pytest.mark.world_size(2)
def test_sharded_mlp_survives_a_checkpoint(device_mesh, checkpoint_dir):
    plain, other = MLP(), MLP()
    saved, loaded = shard(copy.deepcopy(plain), device_mesh), shard(other, device_mesh)
    assert not torch.equal(loaded.up.weight.to_local(), saved.up.weight.to_local())

    dcp.save({"model": saved}, checkpoint_id=checkpoint_dir)
    dcp.load({"model": loaded}, checkpoint_id=checkpoint_dir)

    torch.testing.assert_close(full_state(loaded), dict(plain.state_dict()), rtol=0, atol=0)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("target", [Shard(0), Shard(1), Replicate()], ids=repr)
@pytest.mark.parametrize("rows", [4, 5, 1], ids=["even", "uneven", "one-rank-empty"])
def test_any_sharding_can_be_loaded_as_any_other(device_mesh, checkpoint_dir, rows, target):
    whole = torch.randn(rows, 3)
    saved = distribute_tensor(whole, device_mesh, [Shard(0)])
    dcp.save({"weight": saved}, checkpoint_id=checkpoint_dir)

    loaded = distribute_tensor(torch.zeros(rows, 3), device_mesh, [target])
    dcp.load({"weight": loaded}, checkpoint_id=checkpoint_dir)

    assert torch.equal(loaded.full_tensor(), whole)
