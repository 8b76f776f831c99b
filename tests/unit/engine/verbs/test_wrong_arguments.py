"""Arguments of another kind than a verb takes: one sentence, before anything is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WRITER = "storage_writer must be a StorageWriter, got str; a folder is passed as checkpoint_id="
READER = "storage_reader must be a StorageReader, got str; a folder is passed as checkpoint_id="


@pytest.mark.parametrize(
    ("verb", "arguments", "text"),
    [
        ("save", {"storage_writer": "folder"}, WRITER),
        ("async_save", {"storage_writer": "folder"}, WRITER),
        ("load", {"storage_reader": "folder"}, READER),
        ("save", {"planner": "p"}, "planner must be a SavePlanner, got str"),
        ("async_save", {"planner": "p"}, "planner must be a SavePlanner, got str"),
        ("load", {"planner": "p"}, "planner must be a LoadPlanner, got str"),
        ("load", {"keys": 5}, "keys must be a name, or a list of names or patterns, got 5"),
        ("load", {"keys": ["w", 5]}, "keys must be a name, or a list of names or patterns, got "),
        ("load", {"rename": "w"}, "rename must be a dict of names or a function, got str"),
    ],
)
def test_an_argument_of_another_kind_is_refused_in_one_sentence(
    tmp_path: Path, verb: str, arguments: dict[str, Any], text: str
) -> None:
    folder = tmp_path / "checkpoint"
    where = (
        {} if any(name.startswith("storage") for name in arguments) else {"checkpoint_id": folder}
    )
    with pytest.raises(TypeError) as refused:
        getattr(dcp, verb)({"w": torch.ones(2)}, **where, **arguments)
    assert str(refused.value).startswith(text)
    assert not folder.exists()


def test_a_folder_that_does_not_exist_is_said_to_be_missing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(CheckpointError) as refused:
        dcp.load({"w": torch.ones(2)}, checkpoint_id=missing)
    assert f"no checkpoint in {missing}: the folder does not exist" in str(refused.value)
    assert "Errno" not in str(refused.value)


def test_a_file_is_said_to_be_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(b"PK")
    with pytest.raises(CheckpointCorruptError, match="is a file, and no folder of a checkpoint"):
        dcp.load({"w": torch.ones(2)}, checkpoint_id=file)
