"""Optimizer state of FSDP1 that is made from a checkpoint, in worlds of gloo ranks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharding_spec import ChunkShardingSpec, ShardMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.optimizer import load_sharded_optimizer_state_dict
from pytest_dcp.errors import CheckpointMismatchError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # torch warns from FSDP1's own use of its other parts.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FEATURES = 5
"""Odd, so that ranks hold unequal chunks."""


def stepped(seed: int, steps: int) -> tuple[FullyShardedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(FEATURES, 3), torch.nn.Linear(3, FEATURES, bias=False)]
    wrap = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    model = wrap(torch.nn.Sequential(*map(wrap, layers)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01 * (seed + 1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, FEATURES)).sum().backward()
        optimizer.step()
    return model, optimizer


def sharded(model: FullyShardedDataParallel) -> Any:
    return FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT)


def saved_state(model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer) -> Any:
    with sharded(model):
        return {
            "model": model.state_dict(),
            "optimizer": FullyShardedDataParallel.optim_state_dict(model, optimizer),
        }


def full_state(model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer) -> Any:
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return FullyShardedDataParallel.optim_state_dict(model, optimizer)


@pytest.mark.parametrize("engine", [dcp, torch_dcp], ids=["ours", "torch"])
@pytest.mark.world_size([2, 3], timeout=90)
def test_a_new_fsdp_optimizer_gets_the_state_that_was_saved(
    checkpoint_dir: Path, rank: int, engine: Any
) -> None:
    folder = checkpoint_dir
    model, optimizer = stepped(seed=1, steps=2)
    engine.save(saved_state(model, optimizer), checkpoint_id=folder)
    other, fresh = stepped(seed=2, steps=0)
    with sharded(other):
        loaded = load_sharded_optimizer_state_dict(
            other.state_dict(), "optimizer", dcp.FileSystemReader(folder)
        )
        flat = FullyShardedDataParallel.optim_state_dict_to_load(other, fresh, loaded["optimizer"])
    fresh.load_state_dict(flat)
    expected = full_state(model, optimizer)
    got = full_state(other, fresh)
    if rank == 0:
        assert got["param_groups"] == expected["param_groups"]
        for name, values in expected["state"].items():
            for key, value in values.items():
                torch.testing.assert_close(got["state"][name][key], value, rtol=0, atol=0)


@pytest.mark.world_size(2, timeout=90)
def test_the_state_dict_is_the_one_that_torch_makes(checkpoint_dir: Path) -> None:
    model, optimizer = stepped(seed=1, steps=2)
    dcp.save(saved_state(model, optimizer), checkpoint_id=checkpoint_dir)
    with sharded(model):
        parameters = model.state_dict()
    ours = load_sharded_optimizer_state_dict(
        parameters, "optimizer", dcp.FileSystemReader(checkpoint_dir)
    )
    theirs = torch_dcp.load_sharded_optimizer_state_dict(
        parameters, "optimizer", torch_dcp.FileSystemReader(checkpoint_dir)
    )
    assert described(ours) == described(theirs)


def described(value: Any) -> Any:
    """A state dict whose tensors are replaced by their values and layout."""
    if isinstance(value, dict):
        return {key: described(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [described(inner) for inner in value]
    if isinstance(value, ShardedTensor):
        said = value.metadata()
        shards = [(tuple(s.shard_offsets), tuple(s.shard_sizes)) for s in said.shards_metadata]
        ranks = [s.placement.rank() for s in said.shards_metadata if s.placement is not None]
        local = [described(shard.tensor) for shard in value.local_shards()]
        return tuple(said.size), sorted(shards), ranks, local
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.tolist()
    return value


ROWS, COLUMNS = 8, 5


def tensor_parallel(size: tuple[int, int], dp: dist.ProcessGroup, column: int) -> ShardedTensor:
    """The tensor that FSDP1 makes of a parameter whose columns are sharded over two ranks.

    Outer: this rank's columns, as a shard of the parameter; inner: its rows of these columns.
    """
    rows, columns = size
    low, high = (0, 3) if column == 0 else (3, columns)
    ranks = dist.get_process_group_ranks(dp)
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{r}/cpu" for r in ranks])
    properties = TensorProperties(dtype=torch.float32)
    inner_metadata = spec.build_metadata(torch.Size((rows, high - low)), properties)
    mine = next(s for s in inner_metadata.shards_metadata if s.placement.rank() == dist.get_rank())
    inner = ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(torch.zeros(mine.shard_sizes), mine)], inner_metadata, process_group=dp
    )
    here, there = f"rank:{dist.get_rank()}/cpu", f"rank:{(dist.get_rank() + 1) % 4}/cpu"
    parts = [
        ShardMetadata([0, 0], [rows, 3], here if column == 0 else there),
        ShardMetadata([0, 3], [rows, columns - 3], here if column == 1 else there),
    ]
    outer = Shard.__new__(Shard)
    # As FSDP does: the outer shard is not checked against the size of the inner tensor.
    outer.tensor, outer.metadata = inner, parts[column]
    whole = ShardedTensorMetadata(parts, torch.Size(size), properties)
    tensor = ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(torch.zeros(parts[column].shard_sizes), parts[column])], whole
    )
    tensor._local_shards = [outer]
    return tensor


@pytest.mark.world_size(4, timeout=90)
def test_a_tensor_parallel_rank_gets_its_columns(
    checkpoint_dir: Path, rank: int, world: Any
) -> None:
    full = torch.arange(float(ROWS * COLUMNS)).reshape(ROWS, COLUMNS)
    state = {"w": {"exp_avg": full, "step": torch.tensor(7.0)}, "free": {"exp_avg": full[:, 0]}}
    dcp.save(
        {"optimizer": {"state": state, "param_groups": [{"lr": 0.5, "params": ["w", "free"]}]}},
        checkpoint_id=checkpoint_dir,
    )
    # Ranks 0 and 2 share the first columns: a group whose ranks are not their global numbers.
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    column = rank % 2
    model = {"w": tensor_parallel((ROWS, COLUMNS), groups[column], column)}
    loaded = load_sharded_optimizer_state_dict(
        model, "optimizer", dcp.FileSystemReader(checkpoint_dir)
    )["optimizer"]
    rows = slice(0, 4) if rank < 2 else slice(4, 8)
    columns = slice(0, 3) if column == 0 else slice(3, 5)
    (shard,) = loaded["state"]["w"]["exp_avg"].local_shards()
    assert torch.equal(shard.tensor, full[rows, columns])
    (shard,) = loaded["state"]["free"]["exp_avg"].local_shards()
    assert torch.equal(shard.tensor, full[rows, 0])
    assert loaded["state"]["w"]["step"].item() == 7.0
    assert loaded["param_groups"] == [{"lr": 0.5, "params": ["w", "free"]}]


@pytest.mark.world_size(2)
def test_a_key_that_was_not_saved_is_named(checkpoint_dir: Path) -> None:
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=checkpoint_dir)
    with pytest.raises(CheckpointMismatchError, match=r"nothing under 'optimizer'.*'model'"):
        load_sharded_optimizer_state_dict({}, "optimizer", dcp.FileSystemReader(checkpoint_dir))


@pytest.mark.world_size(2)
def test_a_short_tensor_leaves_the_last_ranks_without_a_shard(
    checkpoint_dir: Path, rank: int
) -> None:
    value = torch.tensor([[1.0, 2.0]])
    dcp.save({"optimizer": {"state": {"w": {"exp_avg": value}}}}, checkpoint_id=checkpoint_dir)
    loaded = load_sharded_optimizer_state_dict(
        {}, "optimizer", dcp.FileSystemReader(checkpoint_dir)
    )
    shards = loaded["optimizer"]["state"]["w"]["exp_avg"].local_shards()
    assert [shard.tensor.tolist() for shard in shards] == ([[[1.0, 2.0]]] if rank == 0 else [])


@pytest.mark.world_size(2)
def test_damage_reaches_every_rank(checkpoint_dir: Path, world: Any, rank: int) -> None:
    dcp.save(
        {"optimizer": {"state": {"w": {"exp_avg": torch.ones(64, 64)}}}},
        checkpoint_id=checkpoint_dir,
    )
    if rank == 0:
        for file in (f for f in checkpoint_dir.glob("*.distcp") if f.stat().st_size):
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    world.barrier()
    reader = dcp.FileSystemReader(checkpoint_dir, verify="full")
    with pytest.raises(CheckpointException, match="checksum"):
        load_sharded_optimizer_state_dict({}, "optimizer", reader)
