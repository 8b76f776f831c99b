"""An open safetensors file slices as the whole tensor does, and reads only the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT
from pytest_dcp._engine.huggingface.safetensors_file import SafetensorsFile
from pytest_dcp._engine.storages.local_filesystem import FileSystem, disk_of
from pytest_dcp.errors import CheckpointCorruptError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STORED = {
    "w": torch.arange(60.0).reshape(5, 4, 3).to(torch.bfloat16),
    "n": torch.tensor(7),
    "none": torch.zeros(0, 3),
}


@pytest.mark.parametrize(
    ("name", "key", "nbytes"),
    [
        ("w", (slice(1, 3), slice(0, 4), slice(2, 3)), 2 * 24),
        ("w", slice(2, None), 3 * 24),
        ("w", (slice(-2, -1), 1), 24),
        ("w", slice(3, 1), 0),
        ("w", (slice(0, 5, 2), slice(None)), 5 * 24),
        ("w", 4, 5 * 24),
        ("w", (), 5 * 24),
        ("w", ..., 5 * 24),
        ("n", (), 8),
        ("none", (slice(0, 0), slice(0, 3)), 0),
    ],
)
def test_slices_are_those_of_the_tensor(tmp_path: Path, name: str, key: Any, nbytes: int) -> None:
    dcp.save(dict(STORED), storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)))
    (path,) = tmp_path.glob("*.safetensors")
    read: list[int] = []
    with disk_of(FileSystem()).open(tmp_path, path.name) as stream:
        file = SafetensorsFile(stream, path.name, DEFAULT_LIMIT, read.append)
        assert torch.equal(file.get_slice(name)[key], STORED[name][key])
        assert sum(read) == nbytes
        assert torch.equal(file.get_tensor(name), STORED[name])
        assert sorted(file.keys()) == sorted(STORED)
        assert file.metadata()["format"] == "pt"
        with pytest.raises(CheckpointCorruptError, match="no such tensor"):
            file.get_slice("other")
