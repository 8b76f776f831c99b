"""Quantised checkpoints: values as torch's reader makes them, and as the formats define them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    # torch's reader.
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]

INDEX = "model.safetensors.index.json"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    files = {
        "model-00001-of-00002.safetensors": {
            "m.weight": (torch.randn(70, 50) * 10).to(torch.float8_e4m3fn),
            "x_blocks": torch.randint(0, 256, (4, 6, 5, 16), dtype=torch.uint8),
            "plain": torch.randn(3),
        },
        "model-00002-of-00002.safetensors": {
            "m.weight_scale_inv": torch.rand(5, 4),
            "x_scales": torch.randint(100, 140, (4, 6, 5), dtype=torch.uint8),
            "lonely_blocks": torch.randint(0, 256, (2, 2), dtype=torch.uint8),
        },
    }
    for name, state in files.items():
        safetensors.torch.save_file(state, tmp_path / name)
    weight_map = {fqn: name for name, state in files.items() for fqn in state if fqn[0] != "l"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


class OneTarget:
    """A planner for one item."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.target

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def boxes(size: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    yield (0,) * len(size), size
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        low = [int(torch.randint(0, n, (), generator=generator)) for n in size]
        length = [
            int(torch.randint(1, n - start + 1, (), generator=generator))
            for n, start in zip(size, low, strict=True)
        ]
        yield tuple(low), tuple(length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("fqn", "size"), [("m.weight", (70, 50)), ("x_blocks", (4, 6, 160)), ("plain", (3,))]
)
def test_every_box_of_a_quantised_tensor_equals_torchs_dequantised_one(
    quantised: Path,
    fqn: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pytest_dcp._engine.huggingface.quantized.PIECE_BYTES", 4000)
    for low, shape in boxes(size):
        got = []
        for reader in (
            QuantizedHuggingFaceStorageReader(str(quantised), 2, dtype, 16),
            torch_dcp.QuantizedHuggingFaceStorageReader(str(quantised), 1, dtype, 16),
        ):
            index = MetadataIndex(fqn, (0,) * (4 if fqn == "x_blocks" else len(size)))
            stored = (
                index
                if "torch." in type(reader).__module__
                else MetadataIndex(fqn, (0,) * len(size))
            )
            zero = torch.Size((0,) * len(size))
            item = ReadItem(
                LoadItemType.TENSOR, stored, zero, stored, torch.Size(low), torch.Size(shape)
            )
            metadata = reader.read_metadata()
            reader.set_up_storage_reader(metadata, True)
            target = torch.full(shape, -1.0, dtype=torch.float32)
            planner: Any = OneTarget(target)
            reader.read_data(LoadPlan([item]), planner)
            got.append(target)
        assert torch.equal(*got)


def test_a_quantised_checkpoint_is_loaded_like_any_other(quantised: Path) -> None:
    state = {"m.weight": torch.zeros(70, 50), "x_blocks": torch.zeros(4, 6, 160)}
    reader = QuantizedHuggingFaceStorageReader(str(quantised), block_size=16)
    report = dcp.load(state, storage_reader=reader)
    one = safetensors.torch.load_file(quantised / "model-00001-of-00002.safetensors")
    two = safetensors.torch.load_file(quantised / "model-00002-of-00002.safetensors")
    scale = two["m.weight_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(state["m.weight"], one["m.weight"].float() * scale[:70, :50])
    code = int(one["x_blocks"][3, 5, 4, 15]) >> 4
    value = [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7] * (-1 if code > 7 else 1)
    assert state["x_blocks"][3, 5, 159] == value * 2.0 ** (int(two["x_scales"][3, 5, 4]) - 127)
    assert report.bytes_read == 70 * 50 + 5 * 4 * 4 + 4 * 6 * 5 * 17


def test_scales_that_are_too_few_are_named(quantised: Path) -> None:
    state = {"m.weight": torch.zeros(70, 50)}
    reader = QuantizedHuggingFaceStorageReader(str(quantised), block_size=8)
    with pytest.raises(CheckpointException, match=r"shape \(5, 4\).*'m\.weight_scale_inv'"):
        dcp.load(state, storage_reader=reader)


def test_shards_of_a_quantised_tensor_know_their_blocks(quantised: Path, tmp_path: Path) -> None:
    whole = {"m.weight": torch.zeros(70, 50)}
    dcp.load(whole, storage_reader=QuantizedHuggingFaceStorageReader(str(quantised), block_size=16))
    one = safetensors.torch.load_file(quantised / "model-00001-of-00002.safetensors")["m.weight"]
    two = safetensors.torch.load_file(quantised / "model-00002-of-00002.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    for name, offset, state in (
        ("a", {"m.weight": [0, 0]}, {"m.weight": one[:41]}),
        ("b", {"m.weight": [41, 0]}, {"m.weight": one[41:]}),
        ("c", {"m.weight_scale_inv": [0, 0]}, {"m.weight_scale_inv": two["m.weight_scale_inv"]}),
    ):
        said = {fqn: {"saved_offsets": at} for fqn, at in offset.items()}
        safetensors.torch.save_file(
            state, folder / f"{name}.safetensors", {"DCP_SHARDING_INFO": json.dumps(said)}
        )
    parts = {"m.weight": torch.zeros(70, 50)}
    dcp.load(parts, storage_reader=QuantizedHuggingFaceStorageReader(str(folder), block_size=16))
    assert torch.equal(parts["m.weight"], whole["m.weight"])


@pytest.mark.world_size(2)
def test_ranks_dequantise_their_own_shards(
    quantised: Path, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    whole = {"m.weight": torch.zeros(70, 50), "x_blocks": torch.zeros(4, 6, 160)}
    reader = QuantizedHuggingFaceStorageReader(str(quantised), block_size=16)
    dcp.load(whole, storage_reader=reader, no_dist=True)
    for dim in (0, 1):
        parts = {
            name: distribute_tensor(torch.zeros_like(value), device_mesh, [Shard(dim)])
            for name, value in whole.items()
        }
        dcp.load(parts, storage_reader=reader)
        for name, value in whole.items():
            assert torch.equal(parts[name].full_tensor(), value)
