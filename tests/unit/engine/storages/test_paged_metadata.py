"""Checkpoints with a large index: opened, loaded, compared and verified by pages of it."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp._engine.lazy_reading.comparison import compare_checkpoints
from pytest_dcp._engine.lazy_reading.verification import verify_checkpoint
from pytest_dcp._engine.storages.folder_metadata import files_named, read_catalog
from pytest_dcp.errors import CheckpointCorruptError
from support.paged_catalogs import KEYS, PAGE, save_many_chunks, small_pages

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAMES = [f"layers.{n}.weight" for n in range(KEYS)]


@pytest.fixture(autouse=True)
def pages() -> Iterator[None]:
    with small_pages():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("paged") / "checkpoint"
    return folder, save_many_chunks(folder)


@pytest.fixture
def folder(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def damage(folder: Path, part: float = 0.5) -> None:
    """Change a byte of the manifest's chunks."""
    path = folder / ".metadata"
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[-32:-24], "little")
    data[start + int((len(data) - 48 - start) * part)] ^= 1
    path.write_bytes(data)


def test_every_tensor_is_read_as_it_was_saved(
    saved: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, tensors = saved
    for name in (NAMES[0], NAMES[-1], NAMES[17]):
        with dcp.open(folder) as opened:
            assert torch.equal(opened[name].tensor(), tensors[name])  # type: ignore[union-attr]
    with dcp.open(folder, verify="full") as opened:
        assert all(torch.equal(opened[n].tensor(), tensors[n]) for n in NAMES)  # type: ignore[union-attr]
        assert all(torch.equal(t, tensors[n]) for n, t in opened.read(NAMES).items())


def test_a_load_of_all_or_some_tensors_is_right(
    saved: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, tensors = saved
    for names in (NAMES, NAMES[3:5]):
        target = {name: torch.zeros_like(tensors[name]) for name in names}
        dcp.load(target, checkpoint_id=folder)
        assert all(torch.equal(target[name], tensors[name]) for name in names)


def test_without_its_table_it_is_the_same(
    folder: Path, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """As files of older versions are, or those whose table's magic is damaged."""
    path = folder / ".metadata"
    data = bytearray(path.read_bytes())
    at = data.rindex(b"\x89DCPpag\n")
    data[at] ^= 1
    path.write_bytes(data)
    with dcp.open(folder) as opened, dcp.open(saved[0]) as other:
        assert not compare_checkpoints(opened, other, read=False)
        assert torch.equal(opened[NAMES[5]].tensor(), saved[1][NAMES[5]])  # type: ignore[union-attr]


def test_few_bytes_of_the_index_are_read(
    saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved[0]
    size = (folder / ".metadata").stat().st_size
    read_bytes: list[int] = []
    read_into = LocalIn.read_into

    def counted(self: LocalIn, offset: int, view: memoryview) -> int:
        read_bytes.append(read_into(self, offset, view))
        return read_bytes[-1]

    monkeypatch.setattr(LocalIn, "read_into", counted)
    assert len(files_named(Folder(LocalDisk(), folder), ".metadata")) == 2
    assert sum(read_bytes) < 12 * PAGE < size / 20
    read_bytes.clear()
    with dcp.open(folder) as opened:
        assert len(opened[NAMES[9]].shards) == 200  # type: ignore[union-attr]
    assert sum(read_bytes) < 36 * PAGE < size / 10


def test_the_opened_save_stays_readable_after_another_one(
    folder: Path, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    with dcp.open(folder) as opened:
        for path in folder.glob("*.distcp"):
            path.unlink()
        save_many_chunks(folder, fill=1000.0)
        assert torch.equal(opened[NAMES[8]].tensor(), saved[1][NAMES[8]])  # type: ignore[union-attr]
        assert all(torch.equal(opened[n].tensor(), saved[1][n]) for n in NAMES)  # type: ignore[union-attr]


def test_names_and_shards_stay_known_after_it_was_closed(saved: tuple[Path, Any]) -> None:
    with dcp.open(saved[0]) as opened:
        pass
    assert len(opened[NAMES[2]].shards) == 200  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="was closed"):
        opened[NAMES[2]].tensor()  # type: ignore[union-attr]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
@pytest.mark.parametrize(
    "use",
    [
        lambda folder: dcp.open(folder).close(),
        lambda folder: dcp.open(folder)[NAMES[0]].shards,  # type: ignore[union-attr]
        lambda folder: dcp.FileSystemReader(folder).read_metadata().state_dict_metadata[NAMES[0]],
        lambda folder: read_catalog(Folder(LocalDisk(), folder), ".metadata"),
        lambda folder: dcp.load({NAMES[0]: torch.zeros(800, 3)}, checkpoint_id=folder),
    ],
)
def test_no_descriptor_is_left(saved: tuple[Path, Any], use: Callable[[Path], object]) -> None:
    use(saved[0])
    before = descriptors()
    use(saved[0])
    assert descriptors() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_the_file_is_closed_once_all_of_it_was_read(saved: tuple[Path, Any]) -> None:
    before = descriptors()
    catalog = read_catalog(Folder(LocalDisk(), saved[0]), ".metadata")
    assert descriptors() == before + 1
    assert catalog.places.sums.size
    assert descriptors() == before


def test_a_file_cut_off_after_it_was_opened_is_an_error(folder: Path) -> None:
    with dcp.open(folder) as opened:
        os.truncate(folder / ".metadata", 1 << 16)
        with pytest.raises(CheckpointCorruptError, match="cut off") as found:
            opened[NAMES[8]].tensor()  # type: ignore[union-attr]
    assert found.value.file == ".metadata"


@pytest.mark.parametrize("part", [0.02, 0.1, 0.4, 0.6, 0.8, 0.95])
def test_a_damaged_page_fails_a_load_in_words(folder: Path, part: float) -> None:
    damage(folder, part)
    target = {NAMES[0]: torch.zeros(800, 3)}
    with pytest.raises(dcp.CheckpointException) as found:
        dcp.load(target, checkpoint_id=folder)
    ((cause, _),) = found.value.failures.values()
    assert isinstance(cause, CheckpointCorruptError)
    assert cause.file == ".metadata"
    assert "of the manifest" in cause.reason
    assert not target[NAMES[0]].any()


def test_verify_names_the_damaged_page_and_reads_all_other_tensors(folder: Path) -> None:
    damage(folder, 0.4)
    with dcp.open(folder, verify="full") as opened:
        found = verify_checkpoint(opened)
    about_index = [problem.text for problem in found.problems if problem.name is None]
    spoiled = [problem for problem in found.problems if problem.name in NAMES]
    assert len(about_index) == 1
    assert "CRC-32" in about_index[0]
    assert ".metadata" in about_index[0]
    assert 0 < len(spoiled) < KEYS / 4
    assert all("page" in problem.text for problem in spoiled)


@pytest.mark.parametrize("in_table", [True, False])
def test_verify_notices_damage_that_only_torch_would_read(folder: Path, in_table: bool) -> None:
    """In the pickle, or in the magic of the page table, without which the index is read whole."""
    path = folder / ".metadata"
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\x89DCPpag\n") if in_table else len(data) // 4] ^= 1
    path.write_bytes(data)
    with dcp.open(folder, verify="full") as opened:
        found = verify_checkpoint(opened)
    # The value's bytes are no pickle, so it is a problem in any case.
    (problem,) = [one for one in found.problems if one.name != "step"]
    assert problem.name is None
    assert "of the pickle for torch" in problem.text
    assert ".metadata" in problem.text


def test_two_saves_are_compared_by_their_checksums(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    with dcp.open(folder) as one, dcp.open(tmp_path / "other") as other:
        found = compare_checkpoints(one, other, read=False)
        assert not found
        assert found.equal_by_checksums == KEYS + 2
        assert one.bytes_read == other.bytes_read == 0


def test_a_store_of_objects_is_read_whole(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(saved[0]), "/paged", recursive=True)
    try:
        with dcp.open("memory://paged") as opened:
            assert torch.equal(opened[NAMES[4]].tensor(), saved[1][NAMES[4]])  # type: ignore[union-attr]
    finally:
        memory.rm("/paged", recursive=True)
