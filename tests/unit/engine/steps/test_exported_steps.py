"""Exports of a step: one checkpoint with its own bytes alone, at a path or a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults import FaultyStorage, NoSpace
from support.incremental_runs import (
    SHARED,
    assert_holds,
    blank_like,
    bytes_on_disk,
    data_files,
    folder_of,
    incremental,
    mostly_frozen,
    save_all,
    spoil,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# Exports.


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "exported" / "model"


def test_an_export_has_the_step_alone(root: Path, target: Path) -> None:
    states = {
        step: {"big": torch.rand(2000) if step == 1 else SHARED[:7], "frozen": SHARED, "n": step}
        for step in (1, 2, 3)
    }
    manager = incremental(root)
    save_all(manager, states)
    report = manager.export(3, target)
    assert_holds(target, states[3])
    assert report.left_out_bytes > 0
    assert bytes_on_disk(target) < report.nbytes + 20_000
    assert {path.stat().st_nlink for path in target.iterdir()} == {1}
    state = blank_like(states[3])
    torch_dcp.load(state, storage_reader=torch_dcp.FileSystemReader(target), no_dist=True)
    assert torch.equal(state["frozen"], SHARED)


def test_an_export_to_a_url(root: Path) -> None:
    manager = incremental(root)
    save_all(manager, {step: mostly_frozen(step) for step in (1, 2)})
    manager.export(2, "memory://exported/step")
    state = blank_like(mostly_frozen(2))
    dcp.load(state, checkpoint_id="memory://exported/step", no_dist=True)
    assert torch.equal(state["frozen"], SHARED)
    assert state["step"] == 2


def test_an_exported_step_can_be_gone_on_from(root: Path, tmp_path: Path) -> None:
    save_all(manager := incremental(root), {step: mostly_frozen(step) for step in (1, 2)})
    other = tmp_path / "other"
    manager.export(2, folder_of(other, 2))
    save_all(incremental(other), {3: mostly_frozen(3)})
    assert data_files(other, 2).keys() & data_files(other, 3).keys()
    assert_holds(folder_of(other, 3), mostly_frozen(3))


def test_an_export_refuses_a_checkpoint_as_target_and_damage(root: Path, target: Path) -> None:
    manager = incremental(root)
    save_all(manager, {step: mostly_frozen(step) for step in (1, 2)})
    with pytest.raises(ValueError, match=r"step 7 .* is not whole"):
        manager.export(7, target)
    manager.export(1, target)
    with pytest.raises(dcp.CheckpointExistsError, match="is a checkpoint already"):
        manager.export(2, target)
    assert_holds(target, mostly_frozen(1))
    for path in folder_of(root, 2).glob("*.distcp"):
        spoil(path)
    with pytest.raises(dcp.CheckpointCorruptError, match="the step is not exported"):
        manager.export(2, target.parent / "other")
    assert list((target.parent / "other").iterdir()) == []


def test_an_export_that_was_interrupted_can_be_repeated(
    checkpoint_dir: Path, faulty_storage: FaultyStorage
) -> None:
    root, target = checkpoint_dir / "run", checkpoint_dir / "exported"
    manager = incremental(root)
    save_all(manager, {step: mostly_frozen(step) for step in (1, 2)})
    target.mkdir()
    (target / "__0_0-5afe.distcp").write_bytes(b"of an export that was killed")
    (target / "notes.txt").write_text("of somebody else")
    faulty_storage.inject(NoSpace(), on="write", path="*exported/.metadata*")
    with pytest.raises(OSError, match="No space left"):
        manager.export(2, target)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    manager.export(2, target)
    assert_holds(target, mostly_frozen(2))
