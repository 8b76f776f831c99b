"""Folders of shards made whole on their own, by one process or by the ranks together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import _consolidate_hf_safetensors as consolidation_of_torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files,
    consolidate_safetensors_files_on_every_rank,
)
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError
from support.states import numbered, same, spread

pytestmark = [
    pytest.mark.world_size(3, isolation="module"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

MAPPING = {"rows": 1, "columns": 2, "scalar": 1, "empty": 2, "half": 4}
INDEX = "model.safetensors.index.json"


def whole() -> dict[str, torch.Tensor]:
    return {
        "rows": numbered(5, 3),
        "columns": numbered(4, 6, start=20),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 2),
        "half": numbered(3).half(),
    }


def save_shards(folder: Path, mesh: DeviceMesh) -> None:
    placements: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1)}
    state = {
        name: spread(tensor, mesh, placements.get(name, Replicate()))
        for name, tensor in whole().items()
    }
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(state, storage_writer=writer)
    dist.barrier()


def shards_of(folder: Path) -> str:
    """Where the writer puts the shards."""
    inside = folder / "sharded"
    return str(inside if inside.exists() else folder)


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return {name: found[name] for name in sorted(found, key=list(MAPPING).index)}


def only(count: int) -> dict[str, torch.Tensor]:
    return {name: whole()[name] for name in list(MAPPING)[:count]}


@pytest.mark.parametrize("together", [False, True])
def test_the_files_hold_the_whole_tensors(
    checkpoint_dir: Path, device_mesh: DeviceMesh, together: bool
) -> None:
    save_shards(checkpoint_dir / "shards", device_mesh)
    source, target = shards_of(checkpoint_dir / "shards"), checkpoint_dir / "whole"
    if together:
        consolidate_safetensors_files_on_every_rank(source, str(target), MAPPING, num_threads=2)
    elif dist.get_rank() == 0:
        consolidate_safetensors_files(source, str(target), MAPPING)
    dist.barrier()
    names = sorted(path.name for path in target.iterdir())
    assert names == [*(f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 4)), INDEX]
    assert same(read_whole(target), whole())
    got = {name: torch.zeros_like(tensor) for name, tensor in whole().items()}
    dcp.load(got, storage_reader=dcp.HuggingFaceStorageReader(str(target)), no_dist=True)
    assert same(got, whole())


def test_shards_of_torchs_writer_are_made_whole_as_torch_does_it(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    torch_dcp = torch.distributed.checkpoint
    state = {
        "rows": spread(numbered(5, 3), device_mesh, Shard(0)),
        "half": spread(numbered(3).half(), device_mesh, Replicate()),
    }
    writer = torch_dcp.HuggingFaceStorageWriter(
        str(checkpoint_dir / "shards"), save_distributed=True
    )
    torch_dcp.save(state, storage_writer=writer)
    dist.barrier()
    source, mapping = shards_of(checkpoint_dir / "shards"), {"rows": 1, "half": 2}
    consolidate_safetensors_files_on_every_rank(source, str(checkpoint_dir / "ours"), mapping)
    if dist.get_rank() == 0:
        (checkpoint_dir / "theirs").mkdir()
        consolidation_of_torch.consolidate_safetensors_files(
            source, str(checkpoint_dir / "theirs"), mapping
        )
        assert same(read_whole(checkpoint_dir / "ours"), read_whole(checkpoint_dir / "theirs"))


def test_shards_that_do_not_fit_are_named_and_nothing_changes(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    save_shards(checkpoint_dir / "shards", device_mesh)
    source, target = shards_of(checkpoint_dir / "shards"), checkpoint_dir / "whole"
    consolidate_safetensors_files_on_every_rank(source, str(target), MAPPING)
    with pytest.raises(CheckpointException, match=r"lacks tensors .*'other'") as caught:
        consolidate_safetensors_files_on_every_rank(source, str(target), MAPPING | {"other": 1})
    assert isinstance(caught.value.failures[0][0], CheckpointMismatchError)
    with pytest.raises(CheckpointException, match=r"number of a file, from 1.*'rows'"):
        consolidate_safetensors_files_on_every_rank(source, str(target), MAPPING | {"rows": 0})
    with pytest.raises(CheckpointException, match="give another one"):
        consolidate_safetensors_files_on_every_rank(source, source, MAPPING)
    dist.barrier()
    assert same(read_whole(target), whole())


def test_tensors_that_are_left_out_are_warned_of_once(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    save_shards(checkpoint_dir / "shards", device_mesh)
    source, target = shards_of(checkpoint_dir / "shards"), str(checkpoint_dir / "whole")
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match=r"4 tensors .* are left out"):
            consolidate_safetensors_files_on_every_rank(source, target, {"rows": 1})
    else:
        consolidate_safetensors_files_on_every_rank(source, target, {"rows": 1})
    dist.barrier()
    assert same(read_whole(checkpoint_dir / "whole"), only(1))


def test_a_lost_shard_fails_on_every_rank_and_leaves_the_folder_as_it_was(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    save_shards(checkpoint_dir / "shards", device_mesh)
    source, target = shards_of(checkpoint_dir / "shards"), checkpoint_dir / "whole"
    consolidate_safetensors_files_on_every_rank(source, str(target), MAPPING)
    dist.barrier()
    if dist.get_rank() == 0:
        min(Path(source).glob("*.safetensors")).unlink()
    dist.barrier()
    with pytest.raises(CheckpointException) as caught:
        consolidate_safetensors_files_on_every_rank(source, str(target), MAPPING)
    causes = [cause for cause, _ in caught.value.failures.values()]
    assert all(
        isinstance(cause, CheckpointCorruptError | CheckpointMismatchError) for cause in causes
    )
    dist.barrier()
    assert same(read_whole(target), whole())
    assert [path.name for path in target.iterdir() if path.name.endswith(".tmp")] == []
