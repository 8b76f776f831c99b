"""Tensors in safetensors files, read by the package that defines the format."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pytest_dcp._engine.format.write_results import WriteColumns
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_safetensors import read_header
from pytest_dcp._engine.io.write_files import FileJob, Settings, WriteRequest
from pytest_dcp._engine.io.write_safetensors import write_safetensors


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if tensor.numel() else b""


def item(fqn: str, offset: tuple[int, ...], size: tuple[int, ...], value: Any) -> WriteItem:
    if isinstance(value, bytes):
        return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)
    return WriteItem(
        MetadataIndex(fqn, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(torch.Size(offset), value.size()),
            TensorProperties(value.dtype),
            torch.Size(size),
        ),
    )


def written(
    folder: Path, values: list[Any], items: list[WriteItem] | None, jobs: list[FileJob]
) -> WriteColumns:
    settings = Settings(threads=2, copy_ahead_bytes=1)
    source = values.__getitem__
    request = WriteRequest(Folder(LocalDisk(), folder), jobs, source, settings, Observer("save"))
    return write_safetensors(request, items, {"save": "1"})


def test_rows_are_where_the_places_say_with_their_sums(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values: list[Any] = [
        torch.tensor(5),
        torch.randn(3, 4).t(),
        torch.randn(300, 301),
        torch.randn(700, 100).t()[::2],
        torch.empty(0, 3),
        b"a value's bytes",
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.tensor([True, False, True]),
    ]
    items = [
        item(f"t{row}", (0,) * getattr(v, "ndim", 0), getattr(v, "shape", ()), v)
        for row, v in enumerate(values)
    ]
    jobs = [FileJob("one", [0, 2, 4, 6]), FileJob("two", [7, 5, 3, 1]), FileJob("none", [])]
    places = written(tmp_path, values, items, jobs)
    for row, value in enumerate(values):
        file = (tmp_path / places.files[places.file[row]]).read_bytes()
        data = value if isinstance(value, bytes) else bytes_of(value.resolve_conj())
        start, nbytes = int(places.data_start[row]), int(places.data_nbytes[row])
        assert file[start : start + nbytes] == data
        assert (places.start[row], places.length[row]) == (start, nbytes)
        assert start % (1 if isinstance(value, bytes) else value.itemsize) == 0
        sums = places.sums[places.first_sum[row] : places.first_sum[row + 1]].tolist()
        ends = [*range(1 << 16, nbytes, 1 << 16), nbytes] if nbytes else []
        assert sums == [zlib.crc32(data[:end]) for end in ends]
    loaded = safetensors.torch.load_file(tmp_path / "two")
    assert torch.equal(loaded["t3"], values[3])
    assert bytes(loaded["t5"].tolist()) == b"a value's bytes"
    assert safetensors.torch.load_file(tmp_path / "none") == {}


def test_two_parts_of_one_tensor_keep_names_of_their_own(tmp_path: Path) -> None:
    values = [torch.zeros(2), torch.ones(3), torch.full((1,), 7.0), torch.full((2,), 9.0)]
    where = [("w", (0,), (5,)), ("w", (2,), (5,)), ("w#1", (0,), (1,)), ("w", (5,), (5,))]
    items = [item(*box, value) for box, value in zip(where, values, strict=True)]
    written(tmp_path, values, items, [FileJob("f", range(4))])
    loaded = safetensors.torch.load_file(tmp_path / "f")
    assert sorted(map(torch.Tensor.tolist, loaded.values())) == sorted(v.tolist() for v in values)
    assert loaded["w"].tolist() == [0.0, 0.0]
    assert loaded["w#1"].tolist() == [7.0]
    with LocalDisk().open(tmp_path, "f") as file:
        said = json.loads(read_header(file, "f").metadata["DCP_SHARDING_INFO"])
    found = {
        (info.get("fqn", name), tuple(info["saved_offsets"]), tuple(info["full_size"]))
        for name, info in said.items()
    }
    assert found == set(where)


def test_a_sparse_tensor_and_stream_transforms_are_refused(tmp_path: Path) -> None:
    items = [item("w", (0, 0), (2, 2), torch.eye(2))]
    with pytest.raises(TypeError, match=r"'w' is torch\.sparse_coo"):
        written(tmp_path, [torch.eye(2).to_sparse()], items, [FileJob("f", [0])])
    settings = Settings(transforms=[object()])  # type: ignore[list-item]  # any
    folder = Folder(LocalDisk(), tmp_path)
    with pytest.raises(ValueError, match="transforms"):
        write_safetensors(WriteRequest(folder, [], [].__getitem__, settings, Observer("save")), [])
