"""A file system of 50 MB that a save fills: the old checkpoint stays, the next save has room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.huggingface.file_names import data_name as hf_data_name
from pytest_dcp._engine.huggingface.file_names import temporary_name
from pytest_dcp._engine.io.commit import data_name

pytestmark = pytest.mark.filterwarnings("ignore")

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=50m", "none", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"root may not mount a file system here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)


def state_of(fill: float, mib: int) -> dict[str, torch.Tensor]:
    """A state of `mib` MiB, all of one value."""
    return {f"w{n}": torch.full((MIB // 4,), fill) for n in range(mib)}


def whole(folder: Path) -> Any:
    return dcp.HuggingFaceStorageWriter(str(folder))


def shards(folder: Path) -> Any:
    return dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)


def files(folder: Path) -> Any:
    return dcp.FileSystemWriter(folder, single_file_per_rank=False)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a folder": dcp.FileSystemWriter,
    "a file for each item": files,
    "whole tensors": whole,
    "shards": shards,
}


def reader_of(writer: Any, folder: Path) -> Any:
    hugging_face = isinstance(writer, dcp.HuggingFaceStorageWriter)
    kind = dcp.HuggingFaceStorageReader if hugging_face else dcp.FileSystemReader
    return kind(str(folder))


def fill_of(writer: Any, folder: Path, mib: int) -> float:
    """The one value of the checkpoint."""
    target = state_of(-1.0, mib)
    dcp.load(target, storage_reader=reader_of(writer, folder), no_dist=True)
    (fill,) = torch.cat(list(target.values())).unique().tolist()
    return float(fill)


@pytest.mark.parametrize(
    ("name", "background"), [*((name, False) for name in WRITERS), ("a folder", True)]
)
def test_a_full_disk_keeps_the_old_checkpoint_and_recovers(
    small_disk: Path, name: str, background: bool
) -> None:
    folder, make = small_disk / "checkpoint", WRITERS[name]

    def save(fill: float, mib: int) -> None:
        writer, state = make(folder), state_of(fill, mib)
        if background:
            dcp.async_save(state, storage_writer=writer, no_dist=True).result(60)  # type: ignore[union-attr]
        else:
            dcp.save(state, storage_writer=writer, no_dist=True)

    save(1.0, 20)
    before = sorted(path.name for path in folder.iterdir())
    for _ in range(2):
        with pytest.raises(dcp.CheckpointException, match="No space left on device") as caught:
            save(2.0, 40)
        assert str(folder) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(path.name for path in folder.iterdir()) == before
        assert fill_of(make(folder), folder, 20) == 1.0
    for fill in (3.0, 4.0):
        save(fill, 20)
        assert fill_of(make(folder), folder, 20) == fill


@pytest.mark.parametrize("name", WRITERS)
def test_leftovers_of_a_killed_save_make_room_for_the_next(small_disk: Path, name: str) -> None:
    folder, make = small_disk / "checkpoint", WRITERS[name]
    dcp.save(state_of(1.0, 15), storage_writer=make(folder), no_dist=True)
    left = data_name("__1_", 0, "dead01234567")
    if isinstance(make(folder), dcp.HuggingFaceStorageWriter):
        left = temporary_name(hf_data_name(1, 1), "dead01234567")
    (folder / left).write_bytes(bytes(25 * MIB))
    dcp.save(state_of(2.0, 15), storage_writer=make(folder), no_dist=True)
    assert fill_of(make(folder), folder, 15) == 2.0
