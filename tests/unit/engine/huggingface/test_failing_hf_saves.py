"""Saves to safetensors folders that fail: nothing of them stays, and the next one has room."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io.local_disk import LocalDisk

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {"a": torch.ones(1000), "b": torch.zeros(3)}


class FullDisk(dcp.DefaultSavePlanner):
    """Fails when half of the file is written."""

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().resolve_data(write_item)


class FullAtTheEnd(dcp.HuggingFaceStorageWriter):
    """Fails when all files are written, as where another rank could not write its own."""

    def finish(self, metadata: Any, results: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def fail_to_save(folder: Path, distributed: bool, at_the_end: bool) -> None:
    kind = FullAtTheEnd if at_the_end else dcp.HuggingFaceStorageWriter
    planner = dcp.DefaultSavePlanner() if at_the_end else FullDisk()
    writer = kind(str(folder), save_distributed=distributed)
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        dcp.save(STATE, storage_writer=writer, planner=planner, no_dist=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_save_that_fails_takes_its_files_away(
    tmp_path: Path, distributed: bool, at_the_end: bool
) -> None:
    for _ in range(2):
        fail_to_save(tmp_path, distributed, at_the_end)
        assert names(tmp_path) == []


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, at_the_end: bool) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path))
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    before = names(tmp_path)
    fail_to_save(tmp_path, False, at_the_end)
    assert names(tmp_path) == before
    loaded = {"a": torch.zeros(1000)}
    dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(loaded["a"], STATE["a"])


def test_leftovers_of_a_killed_save_are_removed_before_the_next_writes(tmp_path: Path) -> None:
    left = [tmp_path / f"model-0000{n}-of-00001.safetensors-0123abcd.tmp" for n in (1, 2)]
    for path in left:
        path.write_bytes(b"half")
    seen: list[bool] = []

    class Looking(dcp.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            seen.append(any(path.exists() for path in left))
            return super().resolve_data(write_item)

    writer = dcp.HuggingFaceStorageWriter(str(tmp_path))
    dcp.save(STATE, storage_writer=writer, planner=Looking(), no_dist=True)
    assert seen == [False, False]


@pytest.mark.parametrize("name", ["replace", "sync_folder", "remove"])
def test_a_commit_that_fails_takes_its_files_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Wherever it fails before the index is in place; after that the new checkpoint is there."""
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), {"a": 1, "b": 2})
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    newer = {key: value + 5 for key, value in STATE.items()}
    real = getattr(LocalDisk, name)
    for place in range(6):
        calls = [0]

        def failing(*args: Any, calls: list[int] = calls, place: int = place) -> Any:
            calls[0] += 1
            if calls[0] > place:
                raise OSError(errno.EIO, "the disk fails")
            return real(*args)

        before = names(tmp_path)
        monkeypatch.setattr(LocalDisk, name, failing)
        failed = False
        try:
            dcp.save(newer, storage_writer=writer, no_dist=True)
        except dcp.CheckpointException:
            failed = True
        monkeypatch.undo()
        loaded = {key: torch.zeros_like(value) for key, value in STATE.items()}
        dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
        found = [
            all(torch.equal(loaded[key], state[key]) for key in state) for state in (STATE, newer)
        ]
        assert found[1] or (failed and found[0])
        if failed and found[0]:
            assert names(tmp_path) == before or name == "remove"
        dcp.save(STATE, storage_writer=writer, no_dist=True)
        assert len(names(tmp_path)) == 3


def test_a_save_over_another_changes_no_file_of_it(tmp_path: Path) -> None:
    """Its files get other names where the usual ones are taken; the next save finds them free."""
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path))
    usual = "model-00001-of-00001.safetensors"
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    assert usual in names(tmp_path)
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    (other,) = tmp_path.glob("*.safetensors")
    assert re.fullmatch(r"model-00001-of-00001-[0-9a-f]{12}\.safetensors", other.name)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {other.name}
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    assert names(tmp_path) == [usual, "model.safetensors.index.json"]
