"""Meta device: a model is built without memory, sharded, given memory and filled from a checkpoint.

A model too large for one process starts this way: no rank ever holds all of it.
"""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pytest_dcp.checkpoint as dcp
from pytest_dcp.demo.model import MLP


def tensor_parallel(model, device_mesh):
    return parallelize_module(
        model, device_mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def fully_sharded(model, device_mesh):
    return fully_shard(model, mesh=device_mesh)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("shard", [tensor_parallel, fully_sharded])
def test_model_built_on_meta_is_filled_from_a_checkpoint(
    shard, device_mesh, device, checkpoint_dir
):
    plain = MLP()
    dcp.save({"model": plain}, checkpoint_id=checkpoint_dir)

    with torch.device("meta"):
        model = MLP()
    shard(model, device_mesh)
    assert all(parameter.is_meta for parameter in model.parameters())

    model.to_empty(device=device)
    dcp.load({"model": model}, checkpoint_id=checkpoint_dir)

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), plain.get_parameter(name)), name
