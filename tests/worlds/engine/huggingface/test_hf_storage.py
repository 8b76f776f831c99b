"""Hugging Face folders: ours, torch's and the safetensors package's read and write each other's."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.safetensors_header import StoredTensor
from pytest_dcp._engine.huggingface import consolidate
from pytest_dcp._engine.huggingface.consolidate import Shards
from pytest_dcp._engine.io.tensor_batches import slabs_of
from pytest_dcp.checkpoint.filesystem import SerializationFormat
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    # torch's reader.
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]

INDEX = "model.safetensors.index.json"


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "scalar": torch.tensor(7, dtype=torch.int64),
        "half": torch.randn(3, 4).bfloat16(),
        "turned": torch.randn(6, 4).t(),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
        "tiny": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64),
        "wide": torch.randn(5, dtype=torch.float64),
        "large": torch.randn(301, 97),
    }


def blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def bits(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: (value.dtype, value.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, value in state.items()
    }


def whole_files(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors that safetensors loads from the index's files; asserts that the index is right."""
    said = json.loads((folder / INDEX).read_text())
    files = {n: safetensors.torch.load_file(folder / n) for n in set(said["weight_map"].values())}
    found = {name: value for file in files.values() for name, value in file.items()}
    assert said["weight_map"] == {name: file for file in files for name in files[file]}
    assert said["metadata"]["total_size"] == sum(v.numel() * v.itemsize for v in found.values())
    return found


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


SPLIT = {name: 1 + n % 2 for n, name in enumerate(values())}
each_mapping = pytest.mark.parametrize("mapping", [None, SPLIT], ids=["one file", "two files"])


# Whole tensors.


@each_mapping
def test_whole_tensors_are_read_by_everybody(tmp_path: Path, mapping: dict[str, int]) -> None:
    state = values()
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(tmp_path), mapping, 2))
    count = 2 if mapping else 1
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names_in(tmp_path) == [*files, INDEX]
    assert bits(whole_files(tmp_path)) == bits(state)
    for engine, reader in product(
        (dcp, torch_dcp), (HuggingFaceStorageReader, torch_dcp.HuggingFaceStorageReader)
    ):
        got = blank(state)
        engine.load(got, storage_reader=reader(str(tmp_path), thread_count=2))
        assert bits(got) == bits(state)


@each_mapping
def test_whole_tensors_that_torch_wrote_are_read(tmp_path: Path, mapping: dict[str, int]) -> None:
    state = {name: value.contiguous() for name, value in values().items()}
    torch_dcp.save(state, storage_writer=torch_dcp.HuggingFaceStorageWriter(str(tmp_path), mapping))
    got = blank(state)
    report = dcp.load(got, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert bits(got) == bits(state)
    assert report.bytes_read == sum(v.numel() * v.itemsize for v in state.values())


def test_a_folder_that_the_package_wrote_is_read_and_converted(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.tensor([1.5, 2.5])}, tmp_path / "model.safetensors")
    got = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    dcp.load(got, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert got["w"].tolist() == [1.5, 2.5]
    assert dcp.load_without_template(
        storage_reader=HuggingFaceStorageReader(str(tmp_path))
    )["w"].tolist() == [1.5, 2.5]  # fmt: skip


def test_the_other_storage_keeps_tensors_and_values_in_safetensors_files(tmp_path: Path) -> None:
    state: dict[str, Any] = {**values(), "epoch": {"n": 3}}
    writer = dcp.FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(state, storage_writer=writer)
    got: dict[str, Any] = {**blank(values()), "epoch": {"n": 0}}
    report = dcp.load(got, checkpoint_id=tmp_path)
    assert got.pop("epoch") == {"n": 3}
    assert bits(got) == bits(values())
    assert report.bytes_verified == report.bytes_needed
    (file,) = tmp_path.glob("*.distcp")
    assert len(safetensors.torch.load_file(file)) == len(state)


# Shards.


def sharded(mesh: DeviceMesh) -> dict[str, DTensor]:
    size = mesh.size()
    torch.manual_seed(0)
    full = {
        "rows": (torch.randn(7, 5), Shard(0)),
        "columns": (torch.arange(60).reshape(4, 15), Shard(1)),
        "copies": (torch.randn(6).bfloat16(), Replicate()),
        "scalar": (torch.tensor(9, dtype=torch.int64), Replicate()),
        "short": (torch.randn(1, 3), Shard(0)),
        "three": (torch.randn(3, size + 1, 4, dtype=torch.float64), Shard(1)),
    }
    return {name: distribute_tensor(t, mesh, [p]) for name, (t, p) in full.items()}


def full(state: dict[str, Any]) -> dict[str, Any]:
    return bits({name: value.full_tensor() for name, value in state.items()})


def zeroed(state: dict[str, DTensor]) -> dict[str, DTensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


@pytest.mark.world_size([1, 2, 4])
def test_shards_come_back_by_every_way_of_reading(
    checkpoint_dir: Path, device_mesh: DeviceMesh, world: Any
) -> None:
    state = sharded(device_mesh)
    writer = HuggingFaceStorageWriter(str(checkpoint_dir), save_distributed=True)
    dcp.save(state, storage_writer=writer)
    world.barrier()
    assert all(name.startswith("shard-0000") for name in names_in(checkpoint_dir))
    for engine, reader in product(
        (dcp, torch_dcp), (HuggingFaceStorageReader, torch_dcp.HuggingFaceStorageReader)
    ):
        got = zeroed(state)
        engine.load(got, storage_reader=reader(str(checkpoint_dir)))
        assert full(got) == full(state)


@pytest.mark.world_size(4)
def test_shards_that_torch_wrote_are_read_in_another_layout(
    checkpoint_dir: Path, device_mesh: DeviceMesh, world: Any
) -> None:
    state = sharded(device_mesh)
    torch_dcp.save(
        state,
        storage_writer=torch_dcp.HuggingFaceStorageWriter(
            str(checkpoint_dir), save_distributed=True
        ),
    )
    world.barrier()
    got = {name: value.redistribute(placements=[Replicate()]) for name, value in state.items()}
    got = zeroed(got)
    dcp.load(got, storage_reader=HuggingFaceStorageReader(str(checkpoint_dir)))
    assert full(got) == full(state)


@each_mapping
@pytest.mark.parametrize("batch", [None, 24], ids=["one batch", "many batches"])
@pytest.mark.world_size([1, 3])
def test_consolidated_files_hold_the_full_tensors(
    checkpoint_dir: Path,
    device_mesh: DeviceMesh,
    world: Any,
    mapping: dict[str, int],
    batch: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if batch is not None:
        monkeypatch.setattr(consolidate, "BATCH_BYTES", batch)
    state = sharded(device_mesh)
    if mapping:
        mapping = {name: 1 + n % 2 for n, name in enumerate(state)}
    writer = HuggingFaceStorageWriter(
        str(checkpoint_dir),
        mapping,
        save_distributed=True,
        enable_consolidation=True,
        thread_count_consolidation=2,
    )
    dcp.save(state, storage_writer=writer)
    world.barrier()
    count = 2 if mapping else 1
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names_in(checkpoint_dir) == [*files, INDEX]
    assert bits(whole_files(checkpoint_dir)) == full(state)
    for folder in (checkpoint_dir, checkpoint_dir / "sharded"):
        got = zeroed(state)
        dcp.load(got, storage_reader=HuggingFaceStorageReader(str(folder)))
        assert full(got) == full(state)


@pytest.mark.world_size(3)
def test_replicas_without_shards_get_one_index_and_no_shared_file(
    checkpoint_dir: Path, device_mesh: DeviceMesh, world: Any
) -> None:
    state = values()
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(checkpoint_dir)))
    world.barrier()
    assert bits(whole_files(checkpoint_dir)) == bits(state)
    with pytest.raises(CheckpointException, match="'rows' is a part of a tensor"):
        dcp.save(sharded(device_mesh), storage_writer=HuggingFaceStorageWriter(str(checkpoint_dir)))
    world.barrier()
    assert bits(whole_files(checkpoint_dir)) == bits(state)


def two_parts_each(rank: int, world_size: int) -> ShardedTensor:
    """Rows of a 2-d tensor, every rank having two blocks that are not neighbours."""
    rows = 2 * world_size
    everything = torch.arange(float(rows * 3)).reshape(rows, 3)
    parts = [ShardMetadata([row, 0], [1, 3], f"rank:{row % world_size}/cpu") for row in range(rows)]
    local = [
        LocalShard(everything[row : row + 1].clone(), parts[row])
        for row in range(rank, rows, world_size)
    ]
    whole = ShardedTensorMetadata(parts, torch.Size((rows, 3)), TensorProperties())
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, whole)


@pytest.mark.world_size(2)
def test_two_parts_of_a_tensor_on_one_rank_are_both_kept(
    checkpoint_dir: Path, rank: int, world_size: int, world: Any
) -> None:
    state = {"w": two_parts_each(rank, world_size)}
    dcp.save(
        state,
        storage_writer=HuggingFaceStorageWriter(
            str(checkpoint_dir), save_distributed=True, enable_consolidation=True
        ),
    )
    world.barrier()
    expected = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(whole_files(checkpoint_dir)["w"], expected)
    for folder in (checkpoint_dir, checkpoint_dir / "sharded"):
        for engine, reader in (
            (dcp, HuggingFaceStorageReader),
            (torch_dcp, torch_dcp.HuggingFaceStorageReader),
        ):
            got = {"w": torch.zeros(4, 3)}
            engine.load(got, storage_reader=reader(str(folder)))
            assert torch.equal(got["w"], expected)


def test_consolidation_holds_one_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    read = Shards.read

    def watched(shards: Shards, wanted: Any, observer: Any) -> list[torch.Tensor]:
        held.append(sum(slab.nbytes for slab in wanted))
        return read(shards, wanted, observer)

    monkeypatch.setattr(consolidate, "BATCH_BYTES", 1000)
    monkeypatch.setattr(Shards, "read", watched)
    state = values()
    writer = HuggingFaceStorageWriter(
        str(tmp_path), save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)
    assert bits(whole_files(tmp_path)) == bits(state)
    assert sum(held) == sum(v.numel() * v.itemsize for v in state.values())
    assert 500 < max(held) <= 1000


@given(
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.sampled_from([torch.uint8, torch.int64]),
    st.integers(8, 64),
)
def test_slabs_are_the_tensor_s_bytes_in_order(
    shape: tuple[int, ...], dtype: torch.dtype, limit: int
) -> None:
    everything = torch.arange(math.prod(shape)).reshape(shape)
    found = []
    for slab in slabs_of(StoredTensor("t", dtype, shape, 0), limit):
        assert slab.nbytes <= limit
        part = everything
        for dim, (start, length) in enumerate(zip(slab.offset, slab.shape, strict=True)):
            part = part.narrow(dim, start, length)
        found += part.reshape(-1).tolist()
    assert found == list(range(math.prod(shape)))
