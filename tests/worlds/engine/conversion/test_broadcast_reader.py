"""A file of `torch.save` into the layouts of many ranks, of which one reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.format_utils import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner
from pytest_dcp.errors import CheckpointMismatchError
from support.states import numbered, spread

pytestmark = pytest.mark.world_size(3, isolation="module")


def saved() -> dict[str, Any]:
    return {
        "model": {"w": numbered(5, 2), "e": numbered(2, 2), "b": numbered(3).bfloat16()},
        "n": torch.tensor(4),
        "none": torch.empty(0, 2),
    }


@pytest.fixture
def file(checkpoint_dir: Path) -> Path:
    """A file that only rank 0 can read."""
    mine = checkpoint_dir / f"rank-{dist.get_rank()}"
    if dist.get_rank() == 0:
        mine.mkdir()
        torch.save(saved(), mine / "state.pt")
    dist.barrier()
    return mine / "state.pt"


def load(state: dict[str, Any], file: Path, coordinator: int = 0) -> None:
    dcp.load(
        state,
        storage_reader=BroadcastingTorchSaveReader(coordinator_rank=coordinator),
        planner=DynamicMetaLoadPlanner(),
        checkpoint_id=file,
    )


def test_each_rank_gets_its_part_in_any_layout(file: Path, device_mesh: DeviceMesh) -> None:
    state = {
        "model": {
            "w": spread(torch.zeros(5, 2), device_mesh, Shard(0)),  # 2, 2 and 1 rows
            "e": spread(torch.zeros(2, 2), device_mesh, Shard(0)),  # nothing on rank 2
            "b": spread(torch.zeros(3), device_mesh, Replicate()),  # of another dtype
        },
        "n": torch.tensor(0),
        "none": torch.empty(0, 2),
    }
    load(state, file)
    expected = saved()
    for name in ("w", "e", "b"):
        whole = state["model"][name].full_tensor()
        assert torch.equal(whole, expected["model"][name].to(whole.dtype)), name
    assert state["n"] == 4


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"model": {"lost": torch.zeros(2)}}, r"'model\.lost': expected a tensor"),
        ({"model": {"w": torch.zeros(4, 2)}}, r"'model\.w': the file has shape \(5, 2\)"),
        ({"model": {"w": 3}}, r"'model\.w'.*tensors only"),
    ],
    ids=["missing", "shape", "value"],
)
def test_a_state_that_does_not_fit_is_named_on_every_rank(
    file: Path, state: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointException, match=text) as caught:
        load(state, file)
    causes = [error for error, _ in caught.value.failures.values()]
    assert all(isinstance(cause, CheckpointMismatchError) for cause in causes)


def test_a_file_that_is_not_there_fails_on_every_rank(file: Path) -> None:
    with pytest.raises(CheckpointException, match="No such file"):
        load({"n": torch.tensor(0)}, file.with_name("other.pt"))


def test_another_coordinator_than_the_loads_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointException, match="another coordinator than the reader"):
        load({"n": torch.tensor(0)}, file, coordinator=1)
