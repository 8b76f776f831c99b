"""The folders of a run: names, notes, and removals that a crash interrupts."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.step_folders import StepFolders, StepNotes, number_of, step_name
from pytest_dcp.checkpoint import save


@pytest.fixture
def folders(tmp_path: Path) -> StepFolders:
    return StepFolders(Folder(LocalDisk(), tmp_path), tmp_path)


def make_step(folders: StepFolders, step: int) -> Path:
    folders.note_start(step, {"loss": 0.5})
    path = Path(folders.folder(step).path)
    (path / ".metadata").write_bytes(b"index")
    (path / "__0_0-1a.distcp").write_bytes(b"data")
    return path


@pytest.mark.parametrize("step", [0, 7, 12345678, 123456789])
def test_a_name_leads_back_to_its_step(step: int) -> None:
    assert number_of(step_name(step)) == step


@pytest.mark.parametrize("name", ["step-7", "step-", "step-0000000x", "other", "step-00000007.tmp"])
def test_a_strangers_name_is_no_step(name: str) -> None:
    assert number_of(name) is None


def test_only_folders_of_steps_are_listed(folders: StepFolders, tmp_path: Path) -> None:
    make_step(folders, 3)
    make_step(folders, 20)
    (tmp_path / "logs").mkdir()
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    assert folders.numbers() == [3, 20]


def test_a_step_that_a_listing_lacks_is_found_by_the_note_of_the_latest(
    folders: StepFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_step(folders, 3)
    folders.note_end(3)
    monkeypatch.setattr(StepFolders, "folder_names", lambda self: [])
    again = StepFolders(folders.root, folders.root.path)
    assert again.numbers() == [3]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"step": "3"}', '{"step": -1}', '{"step": 99}'),
        f'{{"step": 1{"0" * 300}}}',
        "[" * 200_000,
    ],
    ids=range(8),
)
def test_a_wrong_note_of_the_latest_is_ignored(
    folders: StepFolders, tmp_path: Path, text: str
) -> None:
    make_step(folders, 3)
    (tmp_path / "latest.json").write_text(text)
    assert folders.numbers() == [3]


def test_notes_come_back(folders: StepFolders) -> None:
    folders.note_start(3, {"loss": 0.25, "worst": math.inf, "none": math.nan})
    notes = folders.notes(3)
    assert notes.metrics["loss"] == 0.25
    assert notes.metrics["worst"] == math.inf
    assert math.isnan(notes.metrics["none"])
    assert isinstance(notes.saved_at, datetime)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"null", b"[1]", b'{"metrics": 3}', b'{"metrics": {"a": "x"}}', b"\xff\xfe"),
        b'{"metrics": {"a": 1%s}}' % (b"0" * 400),
        b"[" * 200_000,
    ],
    ids=range(8),
)
def test_damaged_notes_are_empty(data: bytes) -> None:
    assert StepNotes.from_bytes(data).metrics == {}


def test_a_removed_step_is_gone_with_its_folder(folders: StepFolders) -> None:
    path = make_step(folders, 3)
    folders.remove(3)
    assert not path.exists()
    assert folders.numbers() == []


def test_a_removal_goes_on_after_a_crash(folders: StepFolders) -> None:
    path = make_step(folders, 3)
    (path / "removal.json").write_bytes(b"{}")
    assert not folders.is_half_removed(3)  # still whole
    (path / ".metadata").unlink()
    assert folders.is_half_removed(3)
    folders.remove(3)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_interrupted_removal_ends_though_listings_lack_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = RunPlace(f"memory://{tmp_path.name}").open_folders()
    save({"w": torch.ones(2)}, checkpoint_id=folders.checkpoint_id(3), no_dist=True)
    folder = folders.folder(3)
    before = folder.names()
    fs = folder.disk.fs  # type: ignore[attr-defined]
    monkeypatch.setattr(type(fs), "ls", lambda self, path, detail=True: [])
    rm_file = type(fs).rm_file

    def remove_the_index_alone(self: Any, path: str) -> None:
        if not path.endswith(".metadata"):
            raise OSError("503 Slow Down")
        rm_file(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "rm_file", remove_the_index_alone)
        with pytest.raises(OSError, match="503"):
            folders.remove(3)
    assert folders.is_half_removed(3)
    folders.remove(3)
    assert len(before) == 2
    assert not any(folder.exists(name) for name in [*before, "removal.json"])


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3}', '{"files": [3, "..", "../other/x", "", "/etc/x"]}']
)
def test_a_wrong_note_of_a_removal_reaches_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = RunPlace(f"memory://{tmp_path.name}").open_folders().folder(3)
    for name, content in (("removal.json", text.encode()), ("data", b"1")):
        with folder.create(name) as out:
            out.write([content])
    removed = []
    monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda self, path: removed.append(path))
    RunPlace(f"memory://{tmp_path.name}").open_folders().remove(3)
    assert sorted(removed) == [f"{folder.path}/data", f"{folder.path}/removal.json"]


def test_a_folder_of_a_stranger_in_a_step_stays(folders: StepFolders) -> None:
    path = make_step(folders, 3)
    (path / "mine").mkdir()
    folders.remove(3)
    assert [entry.name for entry in path.iterdir()] == ["mine"]


def test_a_save_ends_an_earlier_removal(folders: StepFolders) -> None:
    path = make_step(folders, 3)
    (path / "removal.json").write_bytes(b"{}")
    folders.note_start(3, {})
    assert not (path / "removal.json").exists()
