"""Incremental saves where links, indexes or data files are not as they should be."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.block_hashes import ATTRIBUTE, BlockHashes
from pytest_dcp._engine.steps import block_hash
from pytest_dcp._engine.steps.link_files import link_files
from pytest_dcp.checkpoint import CheckpointManager
from pytest_dcp.faults import FaultyStorage, NoSpace
from support.incremental_runs import (
    SHARED,
    assert_holds,
    data_files,
    folder_of,
    incremental,
    mostly_frozen,
    spoil,
)
from support.runs import whole_steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# File systems and damage.


def links_fail(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(source: Any, target: Any, **_: Any) -> None:
        raise OSError(code, os.strerror(code), os.fspath(source), None, os.fspath(target))

    monkeypatch.setattr(os, "link", fail)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV], ids=str)
def test_without_hard_links_a_step_is_full_and_says_so(
    root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    links_fail(monkeypatch, code)
    with pytest.warns(UserWarning, match="saved in full: .* makes no hard links") as caught:
        manager.save(2, mostly_frozen(2))
    assert len(caught) == 1
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert_holds(folder_of(root, 2), mostly_frozen(2))


def test_a_file_with_all_the_links_it_can_have_is_written_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    links_fail(monkeypatch, errno.EMLINK)
    manager.save(2, mostly_frozen(2))
    monkeypatch.undo()
    manager.save(3, mostly_frozen(3))
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert data_files(root, 2).keys() < data_files(root, 3).keys()


def test_other_errors_of_a_link_fail_the_save_and_leave_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    with monkeypatch.context() as broken:
        links_fail(broken, errno.EIO)
        with pytest.raises(dcp.CheckpointException, match="Input/output error"):
            manager.save(2, mostly_frozen(2))
    assert not data_files(root, 2)
    assert whole_steps(manager) == [1]
    manager.save(2, mostly_frozen(2))
    assert data_files(root, 1).keys() < data_files(root, 2).keys()


def test_a_failed_save_leaves_no_links(checkpoint_dir: Path, faulty_storage: FaultyStorage) -> None:
    root = checkpoint_dir / "run"
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    faulty_storage.inject(NoSpace(), on="write", path="*step-00000002/.metadata*")
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        manager.save(2, mostly_frozen(2))
    assert not data_files(root, 2)
    assert all(path.stat().st_nlink == 1 for path in folder_of(root, 1).glob("*.distcp"))
    assert_holds(folder_of(root, 1), mostly_frozen(1))


def test_links_of_a_save_that_was_killed_take_no_space_for_good(root: Path) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    name = next(iter(data_files(root, 1)))
    folder_of(root, 2).mkdir()
    os.link(folder_of(root, 1) / name, folder_of(root, 2) / name)
    (folder_of(root, 2) / "__0_0-5afe.distcp").write_bytes(b"what that save wrote")
    manager.save(2, {"w": torch.ones(3)})
    (aside,) = (root / "not-whole").iterdir()
    assert [path.name for path in aside.iterdir()] == ["__0_0-5afe.distcp"]
    assert (folder_of(root, 1) / name).stat().st_nlink == 1


def test_a_link_out_of_the_earlier_step_is_not_followed(root: Path, tmp_path: Path) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    (path,) = folder_of(root, 1).glob("*.distcp")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # step 1 may be passed over
        manager.save(2, mostly_frozen(2))
    assert path.name not in data_files(root, 2)
    assert_holds(folder_of(root, 2), mostly_frozen(2))


def test_only_plain_files_that_are_long_enough_are_linked(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("plain", "short", "taken"):
        (source / name).write_bytes(b"12345")
    (source / "symlink").symlink_to(source / "plain")
    os.mkfifo(source / "fifo")
    (source / "folder").mkdir()
    (target / "taken").write_bytes(b"of this folder")
    needed = dict.fromkeys(("plain", "taken", "symlink", "fifo", "folder", "missing"), 5)
    assert link_files(needed | {"short": 6}, source, target) == ["plain"]
    assert sorted(path.name for path in target.iterdir()) == ["plain", "taken"]
    assert (target / "taken").read_bytes() == b"of this folder"


def rewrite_index(folder: Path, edit: Any) -> None:
    """Change the hashes in an index, under true checksums of the index itself."""
    path = folder / ".metadata"
    catalog = metadata_file.decode(path.read_bytes())
    hashes = BlockHashes.of_catalog(catalog)
    assert hashes is not None
    catalog.further[ATTRIBUTE].update(edit(hashes))
    path.write_bytes(b"".join(metadata_file.encode(catalog)))


def test_a_hash_that_lies_does_not_pass_for_other_data(root: Path) -> None:
    """All chunks of step 1 claim to be what step 2 saves; their checksums are true."""
    manager = incremental(root)
    manager.save(1, {"w": SHARED})
    changed = SHARED.clone()
    changed[-1, -1] += 1  # after the first 64 KiB, so that only hash and checksums can tell
    rewrite_index(
        folder_of(root, 1),
        lambda hashes: {"digests": block_hash.hash_block(changed, hashes.hash_name)},
    )
    manager.save(2, {"w": changed})
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert_holds(folder_of(root, 2), {"w": changed})


@pytest.mark.parametrize(
    "change",
    [
        {"digests": b"short"},
        {"save": "another"},
        {"hash": "md5"},
        {"hash": 5},
        {"since_full": -1},
        {"more": 1},
    ],
    ids=str,
)
def test_hashes_of_no_use_make_a_full_step(root: Path, change: dict[str, Any]) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    rewrite_index(folder_of(root, 1), lambda hashes: change)
    manager.save(2, mostly_frozen(2))
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert_holds(folder_of(root, 2), mostly_frozen(2))


def test_a_damaged_step_is_not_referred_to_if_every_byte_is_checked(root: Path) -> None:
    """With the default check a load still finds the damage, in all steps that share the file."""
    manager = incremental(root, check="checksums")
    manager.save(1, mostly_frozen(1))
    (path,) = folder_of(root, 1).glob("*.distcp")
    spoil(path)
    manager.save(2, mostly_frozen(2))
    assert_holds(folder_of(root, 2), mostly_frozen(2))
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()


def test_damage_after_the_check_is_not_passed_on_for_good(root: Path) -> None:
    """Step 1 is read when it is saved, then damaged; step 2 shares its file, and is found out."""
    manager = incremental(root, check="checksums", keep_last=5)
    manager.save(1, mostly_frozen(1))
    (path,) = folder_of(root, 1).glob("*.distcp")
    spoil(path)
    for step in (2, 3):
        manager.save(step, mostly_frozen(step))
    assert_holds(folder_of(root, 3), mostly_frozen(3))
    assert not data_files(root, 1).keys() & data_files(root, 3).keys()


def test_damage_in_a_shared_file_is_found_in_each_step(root: Path) -> None:
    manager = incremental(root)
    manager.save(1, mostly_frozen(1))
    (path,) = folder_of(root, 1).glob("*.distcp")
    manager.save(2, mostly_frozen(2))
    spoil(path)
    problems = [step.problem for step in manager.steps(check="checksums")]
    assert all(problem is not None and path.name in problem for problem in problems)


# Refusals.


def test_other_writers_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="full_every= needs incremental=True"):
        CheckpointManager(root, full_every=3, no_dist=True)
    with pytest.raises(ValueError, match="from 1 on"):
        incremental(root, full_every=0)
    with pytest.raises(ValueError, match="storage_writer= cannot be given"):
        incremental(root).save(1, mostly_frozen(1), storage_writer=dcp.FileSystemWriter(root))
    assert not root.exists()
