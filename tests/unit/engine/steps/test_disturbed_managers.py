"""A manager among others: removals beside a load, thousands of steps, strangers' files, forks."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.steps import inspect_step, known_steps
from pytest_dcp._engine.steps import load_step as load_module
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.step_folders import StepFolders, step_name
from pytest_dcp.checkpoint import CheckpointManager
from support.forks import forked
from support.runs import blank, manager_of, save_steps, state_of, whole_steps


def loaded_step(manager: CheckpointManager) -> int | None:
    state = blank()
    loaded = manager.load_latest(state)
    assert loaded is None or loaded.number == state["step"]
    return loaded.number if loaded else None


# Numbers.


def test_long_numbers_are_steps_like_others(root: Path) -> None:
    last = 10**18 - 1
    manager = save_steps(root, 99_999_999, 100_000_000, 10**9, last)
    assert whole_steps(manager) == [99_999_999, 100_000_000, 10**9, last]
    assert loaded_step(manager) == last


def test_a_number_that_no_folder_can_have_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="step takes a number up to 999999999999999999"):
        manager_of(root).save(10**18, state_of(1))
    assert not root.exists()


# Removals by others.


def remove_step(root: Path | str, step: int) -> None:
    RunPlace(root).open_folders().remove(step)


@pytest.mark.parametrize("steps", [[1, 2, 3], [1, 2]])
def test_a_step_that_is_removed_before_its_load_is_passed_over_in_silence(
    root: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(root, *steps).close()
    load = load_module.load
    to_remove = [step for step in steps if step > 1]

    def load_after_removal(*arguments: Any, **keywords: Any) -> Any:
        if to_remove:
            remove_step(root, to_remove.pop())
        return load(*arguments, **keywords)

    monkeypatch.setattr(load_module, "load", load_after_removal)
    assert loaded_step(manager_of(root)) == 1  # a warning would be an error here


@pytest.mark.parametrize("is_url", [False, True])
def test_a_step_that_is_removed_amid_its_load_is_passed_over(
    root: Path, is_url: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"memory://amid-{root.parent.name}" if is_url else root
    save_steps(place, 1, 2).close()
    reader_class = dcp.FsspecReader if is_url else dcp.FileSystemReader
    prepare = reader_class.prepare_data

    def remove_and_prepare(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if str(self.path).endswith("2"):
            remove_step(place, 2)
        return prepare(self, *arguments, **keywords)

    monkeypatch.setattr(reader_class, "prepare_data", remove_and_prepare)
    found = loaded_step(manager_of(place))  # a warning would be an error here
    assert found in ({1} if is_url else {1, 2})  # local files may have been opened before


def test_a_load_that_fails_otherwise_is_the_callers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(root, 1, 2).close()
    tries = []

    def fail(*arguments: Any, **keywords: Any) -> Any:
        tries.append(keywords)
        raise OSError("no route to the disk")

    monkeypatch.setattr(load_module, "load", fail)
    with pytest.raises(OSError, match="no route"):
        manager_of(root).load_latest(blank())
    assert len(tries) == 1


def test_a_note_of_a_removed_step_is_passed_over(root: Path) -> None:
    save_steps(root, 1, 2, 3).close()
    remove_step(root, 3)
    assert '"step": 3' in (root / "latest.json").read_text()
    assert loaded_step(manager_of(root)) == 2


def test_a_step_that_only_a_listing_shows_is_none(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(root, 1).close()
    monkeypatch.setattr(StepFolders, "folder_names", lambda self: [step_name(1), step_name(2)])
    manager = manager_of(root)
    assert loaded_step(manager) == 1  # a warning would be an error here
    assert [step.number for step in manager.steps()] == [1]


# Many steps.


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders whose checkpoints were opened."""
    found = []
    find_problem = known_steps.find_problem

    def look(folder: Folder, *arguments: Any) -> str | None:
        found.append(Path(folder.path).name)
        return find_problem(folder, *arguments)

    monkeypatch.setattr(known_steps, "find_problem", look)
    return found


def test_the_newest_of_ten_thousand_steps_is_looked_at_alone(
    root: Path, looked_at: list[str]
) -> None:
    root.mkdir()
    for step in range(10_000):
        (root / step_name(step)).mkdir()
    save_steps(root, 10_000).close()
    looked_at.clear()
    assert loaded_step(manager_of(root)) == 10_000
    assert looked_at == [step_name(10_000)]


def test_steps_are_listed_without_opening_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_steps(root, 20)
    (root / step_name(7) / ".metadata").unlink()
    opened = []
    monkeypatch.setattr(inspect_step, "read_catalog", lambda *arguments: opened.append(arguments))
    found = manager_of(root).steps(check="names")
    assert [step.number for step in found] == list(range(20))
    assert [step.number for step in found if not step.is_whole] == [7]
    assert opened == []


def test_a_wrong_level_of_a_check_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="check= takes 'names', 'sizes' or 'checksums', got 'al'"):
        manager_of(root).steps(check="al")  # type: ignore[arg-type]


def copy_steps(root: Path, count: int) -> None:
    save_steps(root, 0).close()
    for step in range(1, count):
        shutil.copytree(root / step_name(0), root / step_name(step))


def test_steps_that_are_kept_for_good_are_not_opened_by_each_save(
    root: Path, looked_at: list[str]
) -> None:
    copy_steps(root, 100)
    looked_at.clear()
    save_steps(root, 100, keep_last=2, keep_every=1)
    assert set(looked_at) == {step_name(99), step_name(100)}


def test_steps_among_which_are_the_best_are_opened_once(root: Path, looked_at: list[str]) -> None:
    copy_steps(root, 100)
    manager = save_steps(root, 100, keep_last=2, keep_every=1, best=("loss", "min", 1))
    assert len(set(looked_at)) == 101
    looked_at.clear()
    manager.save(101, state_of(101))
    assert set(looked_at) == {step_name(100), step_name(101)}
    assert len(whole_steps(manager)) == 102


def test_a_step_that_is_damaged_since_it_was_found_whole_is_not_removed(root: Path) -> None:
    manager = save_steps(root, 1, 2, keep_last=2)
    (data,) = (root / step_name(1)).glob("*.distcp")
    data.unlink()
    manager.save(3, state_of(3))
    manager.save(4, state_of(4))
    assert whole_steps(manager) == [3, 4]
    assert (root / step_name(1) / ".metadata").exists()


# Strangers' files, and a folder that cannot be written.


def test_strangers_in_the_folder_disturb_nothing(root: Path) -> None:
    save_steps(root, 1).close()
    (root / "latest.json").unlink()
    (root / "latest.json").mkdir()
    (root / step_name(1) / "step.json").unlink()
    (root / step_name(1) / "step.json").mkdir()
    (root / "notes.txt").write_text("mine")
    (root / step_name(5)).write_text("a file")
    (root / "step-3").mkdir()
    (root / step_name(6)).symlink_to(root / "nowhere")
    manager = manager_of(root)
    assert loaded_step(manager) == 1
    with pytest.warns(UserWarning, match="step 2 is saved, but .* is not noted so"):
        manager.save(2, state_of(2))
    assert loaded_step(manager) == 2
    assert (root / "notes.txt").read_text() == "mine"


def load_as_a_stranger(root: Path) -> list[Any]:
    if os.getuid() == 0:
        os.setuid(65534)
    with pytest.raises(OSError, match="denied"):
        (root / "new").touch()
    manager = manager_of(root)
    latest = manager.latest()
    return [latest.number if latest else None, loaded_step(manager), whole_steps(manager)]


@pytest.fixture
def read_only(root: Path) -> Iterator[Path]:
    """A run of two steps that everybody can read; nobody can write."""
    save_steps(root, 1, 2).close()
    below = [root, *root.rglob("*")]
    above = [path for path in root.parents if not path.stat().st_mode & stat.S_IXOTH]
    before = [(path, stat.S_IMODE(path.stat().st_mode)) for path in (*above, *below)]
    for path in above:
        path.chmod(0o711)
    for path in below:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield root
    for path, mode in before:
        path.chmod(mode)


def test_a_folder_that_cannot_be_written_is_read(read_only: Path) -> None:
    assert forked(lambda _: load_as_a_stranger(read_only)) == [2, 2, [1, 2]]


# Other processes.


def use_in_child(manager: CheckpointManager) -> list[Any]:
    manager.wait()
    try:
        manager.save(7, state_of(7))
    except dcp.CheckpointError as error:
        return [loaded_step(manager), str(error).partition(" in ")[0]]
    return [loaded_step(manager)]


def test_a_forked_manager_reads_and_is_refused_to_save_beside_its_parent(root: Path) -> None:
    manager = save_steps(root, 1, 2)
    assert forked(lambda _: use_in_child(manager)) == [2, "another run saves"]
    manager.close()
    assert forked(lambda _: use_in_child(manager)) == [7]
    assert loaded_step(manager) == 7


def test_a_pickled_manager_goes_on_elsewhere(root: Path) -> None:
    manager = save_steps(root, 1, 2, keep_last=2)
    data = pickle.dumps(manager)
    manager.close()
    again = pickle.loads(data)
    again.save(3, state_of(3))
    assert whole_steps(again) == [2, 3]
    at_url = pickle.loads(pickle.dumps(manager_of(f"memory://pickled-{root.parent.name}")))
    at_url.save(1, state_of(1))
    assert loaded_step(at_url) == 1
