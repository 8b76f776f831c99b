"""Megatron-Core: `dist_checkpointing`, waiting and in the background, resharded, and opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
from torch import distributed as dist

torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import (  # noqa: E402
    AsyncCallsQueue,
)
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    TorchDistSaveShardedStrategy,
)

from pytest_dcp._engine.lazy_reading.open_checkpoint import open_checkpoint  # noqa: E402
from pytest_dcp._engine.lazy_reading.verification import verify_checkpoint  # noqa: E402

COLUMNS = 6


def sharded_state(values: dict[str, torch.Tensor], *, axis: int) -> dict[str, Any]:
    """Rows or columns of one tensor on each rank, a replicated tensor, and an object of each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {
        "split": ShardedTensor.from_rank_offsets("split", values["split"], (axis, rank, world)),
        "same": ShardedTensor.from_rank_offsets("same", values["same"], replica_id=rank),
        "extra": ShardedObject("extra", {"rank": rank, "list": [1, "two"]}, (world,), (rank,)),
        "common": {"iteration": 7, "arguments": ("a", 1.5)},
    }


def make_values(*, axis: int, seed: int) -> dict[str, torch.Tensor]:
    world = dist.get_world_size()
    shape = (4, COLUMNS) if axis == 0 else (4 * world, COLUMNS // world)
    mine = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    same = torch.Generator().manual_seed(seed)
    return {
        "split": torch.randn(shape, generator=mine),
        "same": torch.randn(5, dtype=torch.bfloat16, generator=same),
    }


def save(values: dict[str, torch.Tensor], folder: Path, *, in_background: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2)
    request = dist_checkpointing.save(
        sharded_state(values, axis=0), str(folder), strategy, async_sharded_save=in_background
    )
    if in_background:
        calls = AsyncCallsQueue()
        calls.schedule_async_request(request)
        calls.maybe_finalize_async_calls(blocking=True)
        calls.close()


def look_into(folder: Path) -> str:
    """The folder as `dcp.open` and `verify` see it: tensors, and the values of `common.pt`."""
    with open_checkpoint(folder, verify="full") as opened:
        assert verify_checkpoint(opened).problems == ()
        tensors = sorted(opened.read(["split", "same"]).items())
        return repr([measure.digest(tensors), dict(opened.common)])


def program(mode: str, folder: Path) -> dict[str, Any]:
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    found = {}
    for how in ("waiting", "background"):
        values = make_values(axis=0, seed=1)
        if mode == "save":
            save(values, folder / how, in_background=how == "background")
            found[f"{how} rows"] = measure.digest(list(values.values()))
        else:
            empty = {name: torch.zeros_like(value) for name, value in values.items()}
            loaded = dist_checkpointing.load(sharded_state(empty, axis=0), str(folder / how))
            found[f"{how} rows"] = measure.digest([loaded["split"], loaded["same"]])
            found[f"{how} objects"] = repr([loaded["extra"], loaded["common"]])
        columns = make_values(axis=1, seed=2)
        loaded = dist_checkpointing.load(sharded_state(columns, axis=1), str(folder / how))
        found[f"{how} columns"] = measure.digest([loaded["split"], loaded["same"]])
        whole = dist_checkpointing.load_plain_tensors(str(folder / how))
        found[f"{how} whole"] = measure.digest(sorted(whole.items()))
        found[f"{how} opened"] = look_into(folder / how)
    return found


if __name__ == "__main__":
    measure.run(program)
