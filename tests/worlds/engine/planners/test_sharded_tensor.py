"""ShardedTensor, the kind before DTensor: saved in chunks, loaded in others, beside tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torch.distributed._shard.sharding_spec.chunk_sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from support.states import numbered, spread, torch_dcp, without_warnings

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore:Please use DTensor instead"),
]

Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxed(full: torch.Tensor, boxes: Sequence[tuple[int, Box]]) -> ShardedTensor:
    """A ShardedTensor of the full tensor's boxes, each on the rank that is said."""
    shards = []
    for rank, (offset, size) in boxes:
        if rank == dist.get_rank():
            part = full
            for dim, (start, length) in enumerate(zip(offset, size, strict=True)):
                part = part.narrow(dim, start, length)
            shards.append(LocalShard.from_tensor_and_offsets(part.clone(), list(offset), rank))
    return sharded_tensor.init_from_local_shards(shards, full.shape)


def chunked(full: torch.Tensor, ranks: Sequence[int], dim: int = 0) -> ShardedTensor:
    """Cut along one dimension, by torch's own rule."""
    placements = [f"rank:{rank}/cpu" for rank in ranks]
    tensor = made(ChunkShardingSpec(dim=dim, placements=placements), full.shape)
    fill(tensor, full)
    return tensor


def made(spec: Any, shape: Sequence[int]) -> ShardedTensor:
    with without_warnings("Please use DTensor instead"):
        return sharded_tensor.zeros(spec, *shape)


def fill(tensor: ShardedTensor, full: torch.Tensor | None) -> None:
    for shard in tensor.local_shards():
        shard.tensor.copy_(torch.zeros(()) if full is None else part(shard, full))


def part(shard: Any, full: torch.Tensor) -> torch.Tensor:
    meta: ShardMetadata = shard.metadata
    for dim, (start, length) in enumerate(zip(meta.shard_offsets, meta.shard_sizes, strict=True)):
        full = full.narrow(dim, start, length)
    return full


def holds(tensor: ShardedTensor, full: torch.Tensor) -> bool:
    return all(torch.equal(s.tensor, part(s, full)) for s in tensor.local_shards())


FULL = numbered(10, 6)
QUARTERS: list[tuple[int, Box]] = [
    (0, ((0, 0), (3, 6))),
    (1, ((3, 0), (7, 2))),
    (2, ((3, 2), (4, 4))),
    (3, ((7, 2), (3, 4))),
]
SEVERAL_EACH: list[tuple[int, Box]] = [
    (n % 4, ((n // 2 * 2, n % 2 * 3), (2, 3))) for n in range(10)
]


def one_each() -> dict[str, ShardedTensor]:
    return {
        "rows": chunked(FULL, range(4)),
        "columns": chunked(FULL, range(4), dim=1),
        "turned": chunked(FULL, (3, 1, 2, 0)),
        "quarters": boxed(FULL, QUARTERS),
    }


def none_or_several() -> dict[str, ShardedTensor]:
    return {"some": chunked(FULL, (1, 3)), "several": boxed(FULL, SEVERAL_EACH)}


def kinds() -> dict[str, ShardedTensor]:
    return one_each() | none_or_several()


@pytest.mark.parametrize(
    "targets",
    [
        one_each,
        none_or_several,
    ],
)
def test_any_chunks_are_loaded_in_any_others(
    checkpoint_dir: Path, device_mesh: DeviceMesh, targets: Callable[[], dict[str, ShardedTensor]]
) -> None:
    saved = kinds()
    dcp.save(dict(saved), checkpoint_id=checkpoint_dir / "ours")
    torch_dcp.save(dict(saved), checkpoint_id=checkpoint_dir / "torchs")
    for which in ("ours", "torchs"):
        for name in saved:
            target = targets()
            for tensor in target.values():
                fill(tensor, None)
            report = dcp.load(
                dict(target),
                checkpoint_id=checkpoint_dir / which,
                rename=dict.fromkeys(target, name),
            )
            assert report.missing == ()
            assert all(holds(tensor, FULL) for tensor in target.values()), (which, name)
        columns = spread(FULL * 0, device_mesh, Shard(0))
        others = {"rows": torch.zeros(10, 6), "columns": columns}
        dcp.load(others, checkpoint_id=checkpoint_dir / which)
        assert torch.equal(others["rows"], FULL)
        expected = spread(FULL, device_mesh, Shard(0)).to_local()
        assert torch.equal(columns.to_local(), expected)


def test_a_load_calls_nothing_that_torch_deprecates(checkpoint_dir: Path) -> None:
    target = chunked(FULL, range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcp.save({"w": target}, checkpoint_id=checkpoint_dir)
        dcp.load({"w": target}, checkpoint_id=checkpoint_dir)


def test_torch_reads_the_chunks_that_we_write(checkpoint_dir: Path) -> None:
    dcp.save(dict(kinds()), checkpoint_id=checkpoint_dir)
    for name in kinds():
        target = {name: chunked(FULL * 0, (2, 3, 0, 1), dim=1)}
        torch_dcp.load(dict(target), checkpoint_id=checkpoint_dir)
        assert holds(target[name], FULL), name


def test_a_spec_that_lists_its_shards(checkpoint_dir: Path) -> None:
    def listed() -> ShardedTensor:
        shards = [
            ShardMetadata(list(offset), list(size), f"rank:{rank}/cpu")
            for rank, (offset, size) in QUARTERS
        ]
        return made(EnumerableShardingSpec(shards), (10, 6))

    saved = listed()
    fill(saved, FULL)
    dcp.save({"w": saved, "b": FULL[0]}, checkpoint_id=checkpoint_dir)
    target: dict[str, Any] = {"w": chunked(FULL * 0, range(4)), "b": torch.zeros(6)}
    dcp.load(dict(target), checkpoint_id=checkpoint_dir)
    assert holds(target["w"], FULL)
    plain = {"w": torch.zeros(10, 6)}
    dcp.load(plain, checkpoint_id=checkpoint_dir)
    assert torch.equal(plain["w"], FULL)
    again = listed()
    dcp.load({"w": again}, checkpoint_id=checkpoint_dir)
    assert holds(again, FULL)


def test_metadata_of_shards_names_every_box(checkpoint_dir: Path) -> None:
    metadata = dcp.save({"w": boxed(FULL, QUARTERS)}, checkpoint_id=checkpoint_dir)
    stored = metadata.state_dict_metadata["w"]
    assert isinstance(stored, dcp.TensorStorageMetadata)
    assert stored.size == FULL.size()
    found = {(tuple(c.offsets), tuple(c.sizes)) for c in stored.chunks}
    assert found == {box for _, box in QUARTERS}


def test_a_sharded_tensor_of_another_size_is_refused(checkpoint_dir: Path) -> None:
    dcp.save({"w": chunked(FULL, range(4))}, checkpoint_id=checkpoint_dir)
    with pytest.raises(CheckpointException, match=r"Size mismatch .* for w"):
        dcp.load({"w": chunked(numbered(9, 6), range(4))}, checkpoint_id=checkpoint_dir)


def test_a_sharded_tensor_on_the_meta_device_is_refused(checkpoint_dir: Path) -> None:
    dcp.save({"model": {"w": chunked(FULL, range(4))}}, checkpoint_id=checkpoint_dir)
    spec = ChunkShardingSpec(dim=0, placements=[f"rank:{rank}/meta" for rank in range(4)])
    target = made(spec, (10, 6))
    with pytest.raises(CheckpointException, match="meta"):
        dcp.load({"model": {"w": target}}, checkpoint_id=checkpoint_dir)
