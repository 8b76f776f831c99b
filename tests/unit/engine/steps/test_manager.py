"""The manager of a run's steps, in one process: what it saves, finds, passes over and removes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults import FaultyStorage, InputOutput, NoSpace
from support.runs import blank, manager_of, save_steps, state_of, whole_steps


def data_file(root: Path, step: int) -> Path:
    (path,) = (root / f"step-{step:08d}").glob("*.distcp")
    return path


def spoil_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for offset in range(len(data) // 4, len(data)):
        data[offset] ^= 0xFF
    path.write_bytes(data)


# Saving and loading.


def test_the_newest_step_is_loaded(root: Path) -> None:
    save_steps(root, 10, 20).close()
    state = blank()
    loaded = manager_of(root).load_latest(state)
    assert loaded is not None
    assert loaded.number == 20
    assert state["step"] == 20
    assert torch.equal(state["w"], state_of(20)["w"])


def test_a_run_without_steps_has_none(root: Path) -> None:
    manager = manager_of(root)
    assert manager.latest() is None
    assert manager.load_latest(blank()) is None
    assert manager.steps() == []
    assert not root.exists()


def test_metrics_and_times_come_back(root: Path) -> None:
    manager = manager_of(root)
    manager.save(1, state_of(1), metrics={"loss": 0.5, "count": 3})
    latest = manager.latest()
    assert latest is not None
    assert latest.metrics == {"loss": 0.5, "count": 3.0}
    assert latest.saved_at is not None


def test_a_background_save_is_found_when_it_has_ended(root: Path) -> None:
    manager = manager_of(root, keep_last=1)
    state = state_of(1)
    manager.async_save(1, state)
    state["w"].zero_()
    manager.async_save(2, state_of(2))
    manager.wait()
    assert whole_steps(manager) == [2]
    loaded = blank()
    manager.load_latest(loaded)
    assert torch.equal(loaded["w"], state_of(2)["w"])


def test_a_failed_background_save_is_raised_by_the_next_call(
    checkpoint_dir: Path, faulty_storage: FaultyStorage
) -> None:
    manager = manager_of(checkpoint_dir / "run")
    manager.save(1, state_of(1))
    faulty_storage.inject(NoSpace(), on="write", path="*step-00000002/*.distcp")
    manager.async_save(2, state_of(2))
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        manager.wait()
    assert whole_steps(manager) == [1]
    manager.save(3, state_of(3))
    assert whole_steps(manager) == [1, 3]


def test_steps_are_kept_at_a_url(tmp_path: Path) -> None:
    url = f"memory://run-{tmp_path.name}"
    manager = save_steps(url, 1, 2, 3, keep_last=2)
    assert whole_steps(manager) == [2, 3]
    state = blank()
    loaded = manager_of(url).load_latest(state)
    assert loaded is not None
    assert loaded.number == state["step"] == 3


# Order.


@pytest.mark.parametrize("step", [10, 9])
def test_a_step_that_does_not_come_after_the_newest_is_refused(root: Path, step: int) -> None:
    manager = save_steps(root, 10)
    with pytest.raises(dcp.CheckpointExistsError, match=r"step 10 in .* is whole"):
        manager.save(step, state_of(step))
    assert whole_steps(manager) == [10]


def test_a_run_can_go_on_from_an_earlier_step(root: Path) -> None:
    manager = save_steps(root, 1, 2, 3)
    assert manager.remove_after(1) == [2, 3]
    manager.save(2, state_of(20))
    state = blank()
    manager.load_latest(state)
    assert state["step"] == 20


def test_a_run_cannot_go_on_from_a_step_that_is_not_whole(root: Path) -> None:
    manager = save_steps(root, 1, 2, 3)
    data_file(root, 2).unlink()
    with pytest.raises(ValueError, match=r"step 2 in .* is not whole: .* is missing"):
        manager.remove_after(2)
    with pytest.raises(ValueError, match=r"step 7 in .* is not whole"):
        manager.remove_after(7)
    assert whole_steps(manager) == [1, 3]


# Damage.


def hide(root: Path, step: int) -> None:
    (root / f"step-{step:08d}" / ".metadata").unlink()


def spoil_index(root: Path, step: int) -> None:
    spoil_file(root / f"step-{step:08d}" / ".metadata")


def cut(root: Path, step: int) -> None:
    path = data_file(root, step)
    path.write_bytes(path.read_bytes()[:100])


def lose_data(root: Path, step: int) -> None:
    data_file(root, step).unlink()


def spoil_data(root: Path, step: int) -> None:
    spoil_file(data_file(root, step))


@pytest.mark.parametrize("damage", [hide, spoil_index, cut, lose_data, spoil_data])
def test_a_damaged_step_is_passed_over_with_a_warning(root: Path, damage: Any) -> None:
    save_steps(root, 1, 2).close()
    damage(root, 2)
    state = blank()
    with pytest.warns(UserWarning, match="step 2 in .* is not whole and is passed over: "):
        loaded = manager_of(root).load_latest(state)
    assert loaded is not None
    assert loaded.number == state["step"] == 1
    assert torch.equal(state["w"], state_of(1)["w"])


def test_the_warning_names_the_callers_line(root: Path) -> None:
    save_steps(root, 1, 2).close()
    hide(root, 2)
    with pytest.warns(UserWarning, match="step 2") as caught:
        manager_of(root).load_latest(blank())
    assert caught[0].filename == __file__


def test_a_run_of_damaged_steps_is_not_begun_anew(root: Path) -> None:
    save_steps(root, 1, 2).close()
    hide(root, 1)
    lose_data(root, 2)
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(
            dcp.CheckpointCorruptError, match=r"none of them is whole .*step 1: .*step 2"
        ),
    ):
        manager_of(root).load_latest(blank())


def test_checksums_are_looked_at_on_demand(root: Path) -> None:
    manager = save_steps(root, 1, 2)
    spoil_data(root, 2)
    assert [step.is_whole for step in manager.steps()] == [True, True]
    one, two = manager.steps(check="checksums")
    assert (one.is_whole, one.is_verified) == (True, True)
    assert (two.is_whole, two.is_verified) == (False, False)
    assert "__0_0" in (two.problem or "")
    with pytest.warns(UserWarning, match="step 2"):
        latest = manager_of(root, check="checksums").latest()
    assert latest is not None
    assert (latest.number, latest.is_verified) == (1, True)


def test_a_state_that_does_not_fit_is_the_callers_error(root: Path) -> None:
    save_steps(root, 1, 2).close()
    manager = manager_of(root)
    with pytest.raises(dcp.CheckpointMismatchError):
        manager.load_latest({"v": torch.zeros(8)})  # a warning would be an error here


def test_a_step_that_is_not_whole_is_moved_aside_by_a_new_save(root: Path) -> None:
    save_steps(root, 1, 2).close()
    hide(root, 2)
    manager = manager_of(root)
    manager.save(2, state_of(2))
    assert whole_steps(manager) == [1, 2]
    (aside,) = (root / "not-whole").iterdir()
    assert aside.name.startswith("step-00000002-")
    assert list(aside.glob("*.distcp"))


# Retention.


def test_old_steps_are_removed(root: Path) -> None:
    manager = save_steps(root, 1, 2, 3, 4, 5, 6, keep_last=2, keep_every=3)
    assert whole_steps(manager) == [3, 5, 6]


def test_the_best_steps_are_kept(root: Path) -> None:
    manager = manager_of(root, keep_last=1, best=("loss", "min", 1))
    for step, loss in enumerate([0.5, 0.1, 0.3, 0.2]):
        manager.save(step, state_of(step), metrics={"loss": loss})
    assert whole_steps(manager) == [1, 3]


def test_a_damaged_step_does_not_count_and_stays(root: Path) -> None:
    manager = save_steps(root, 1, 2, 3)
    lose_data(root, 3)
    again = manager_of(root, keep_last=2)
    manager.close()
    again.save(4, state_of(4))
    assert whole_steps(again) == [2, 4]
    assert (root / "step-00000003" / ".metadata").exists()


def test_a_removal_that_fails_is_a_warning(
    checkpoint_dir: Path, faulty_storage: FaultyStorage
) -> None:
    root = checkpoint_dir / "run"
    manager = save_steps(root, 1, keep_last=1)
    faulty_storage.inject(InputOutput(), on="remove", path="*step-00000001/*")
    with pytest.warns(UserWarning, match="old steps in .* were not removed"):
        manager.save(2, state_of(2))
    latest = manager.latest()
    assert latest is not None
    assert latest.number == 2
    manager.save(3, state_of(3))
    assert whole_steps(manager) == [3]


def test_a_reader_of_a_removed_step_reads_on(root: Path) -> None:
    manager = save_steps(root, 1, keep_last=1)
    with dcp.open_checkpoint(root / "step-00000001") as opened:
        manager.save(2, state_of(2))
        assert torch.equal(opened["w"].tensor(), state_of(1)["w"])


# Several runs.

OTHER = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pytest_dcp.checkpoint import CheckpointManager
manager = CheckpointManager(sys.argv[1], no_dist=True)
try:
    manager.save(5, {"w": torch.zeros(8), "step": 5})
except Exception as error:
    print(error)
print([step.number for step in manager.steps()])
"""


def run_other(root: Path) -> list[str]:
    command = [sys.executable, "-c", OTHER, str(root)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return ran.stdout.splitlines()


def test_a_second_run_may_read_but_not_save(root: Path) -> None:
    manager = save_steps(root, 1)
    refused, found = run_other(root)
    assert "another run saves in" in refused
    assert "process " in refused
    assert found == "[1]"
    manager.close()
    assert run_other(root) == ["[1, 5]"]


# Wrong arguments.


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"keep_last": 0}, "keep_last= takes a number from 1 on"),
        ({"keep_every": 5}, "need keep_last="),
        ({"best": ("loss", "min", 1)}, "need keep_last="),
        ({"check": "all"}, "check= takes 'sizes' or 'checksums', got 'all'"),
    ],
)
def test_wrong_rules_are_refused(root: Path, keywords: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        manager_of(root, **keywords)


@pytest.mark.parametrize("save", ["save", "async_save"])
def test_a_step_that_each_rank_would_commit_alone_is_refused(root: Path, save: str) -> None:
    with pytest.raises(ValueError, match="use_collectives=False cannot be given"):
        getattr(manager_of(root), save)(1, state_of(1), use_collectives=False)
    assert not root.exists()


@pytest.mark.parametrize("step", [-1, 1.5, "3", True])
def test_a_wrong_step_is_refused_before_anything_is_written(root: Path, step: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="step takes a"):
        manager_of(root).save(step, state_of(1))
    assert not root.exists()


def test_a_metric_that_is_no_number_is_refused(root: Path) -> None:
    with pytest.raises(TypeError, match="metrics= takes numbers, got loss='low'"):
        manager_of(root).save(1, state_of(1), metrics={"loss": "low"})  # type: ignore[dict-item]
    assert not root.exists()


def test_a_metric_that_is_nan_is_never_the_best(root: Path) -> None:
    manager = manager_of(root, keep_last=1, best=("loss", "min", 1))
    manager.save(1, state_of(1), metrics={"loss": 0.5})
    with pytest.warns(UserWarning, match="metric 'loss' is NaN"):
        manager.save(2, state_of(2), metrics={"loss": math.nan})
    manager.save(3, state_of(3), metrics={"loss": 0.9})
    assert whole_steps(manager) == [1, 3]


@pytest.mark.parametrize("folder", [None, "", 3])
def test_a_folder_that_is_no_path_is_refused(folder: Any) -> None:
    with pytest.raises(TypeError, match="the folder of a run is a path or a URL"):
        manager_of(folder)
