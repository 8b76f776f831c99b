"""torchdata: a `StatefulDataLoader` with workers, whose place in its data each rank saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader


def make_loader(workers: int) -> Any:
    data = torch.arange(48)
    sampler = DistributedSampler(data, shuffle=True, seed=3)  # type: ignore[arg-type]
    return StatefulDataLoader(data, batch_size=2, sampler=sampler, num_workers=workers)


def program(mode: str, folder: Path) -> dict[str, Any]:
    """Stops in the middle of an epoch; each rank has its own key, as its state is its own."""
    found = {}
    for workers in (0, 2):
        loader, key = make_loader(workers), f"loader-{dist.get_rank()}"
        path = folder / str(workers)
        if mode == "save":
            batches = iter(loader)
            for _ in range(5):
                next(batches)
            dcp.save({key: loader.state_dict()}, checkpoint_id=path)
            found[f"{workers} rest"] = [batch.tolist() for batch in batches]
        else:
            other = make_loader(workers)
            next(iter(other))
            state = {key: other.state_dict()}
            dcp.load(state, checkpoint_id=path)
            loader.load_state_dict(state[key])
            found[f"{workers} rest"] = [batch.tolist() for batch in loader]
    return found


if __name__ == "__main__":
    measure.run(program)
