"""What a run meets in the world: wrong metrics, full disks, no locks, strangers, wrong clocks.

Each ends in an error or a warning in words, no whole step is lost, and the run goes on when the
cause is gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.steps.clean_run import find_leftovers
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.retention import RetentionPolicy
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.step_folders import StepFolders
from pytest_dcp.faults.tap import watch_operations
from pytest_dcp.faults.tap.operation import Operation
from support.disk_changes import BeforeChange
from support.incremental_runs import folder_of
from support.runs import blank, manager_of, save_steps, state_of, whole_steps

IS_NIGHTLY = settings().max_examples >= 10_000


# Metrics.


@pytest.mark.parametrize(
    "metrics",
    [
        {"loss": 10**400},
        {"loss": None},
        {"loss": 1j},
        {"loss": torch.ones(2)},
        {"loss": torch.tensor(1j)},
        {"loss": torch.ones(1, device="meta")},
        {"loss": np.ones(2)},
        ["loss"],
        "loss",
        0.5,
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*only length-1 arrays")
def test_metrics_that_are_no_numbers_are_refused_before_anything_is_written(
    root: Path, metrics: Any
) -> None:
    with pytest.raises(TypeError, match=r"metrics= takes (numbers|names with their numbers), got "):
        manager_of(root).save(1, state_of(1), metrics=metrics)
    assert not root.exists()


def test_metrics_that_would_not_be_read_again_are_refused(root: Path) -> None:
    metrics = {f"{'x' * 1000}{n}": 0.5 for n in range(1100)}
    with pytest.raises(
        ValueError, match=r"metrics= takes at most .* bytes of JSON: these 1100 are"
    ):
        manager_of(root).save(1, state_of(1), metrics=metrics)
    with manager_of(root) as manager:
        manager.save(1, state_of(1), metrics=dict(list(metrics.items())[:1000]))
        (step,) = manager.steps()
    assert len(step.metrics) == 1000


def test_the_metric_of_the_best_steps_is_missed(root: Path) -> None:
    with manager_of(root, keep_last=1, best=("loss", "min", 1)) as manager:
        manager.save(1, state_of(1), metrics={"loss": 0.5})
        with pytest.warns(UserWarning, match="metric 'loss' is missing: best= chooses none of the"):
            manager.save(2, state_of(2), metrics={"Loss": 0.1})
        manager.save(3, state_of(3))  # not measured: a warning would be an error here
        assert whole_steps(manager) == [1, 3]


# Locks.


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_saved_to_with_one_warning(
    root: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with manager_of(root) as manager:
        with pytest.warns(UserWarning, match="has no locks: nothing keeps a second job") as caught:
            manager.save(1, state_of(1))
        manager.save(2, state_of(2))  # a warning would be an error here
        assert [one.filename for one in caught] == [__file__]
        # As after a kill: nothing that the first has left keeps the next from saving.
        with pytest.warns(UserWarning, match="has no locks"):
            assert whole_steps(save_steps(root, 3)) == [1, 2, 3]


def test_other_errors_of_a_lock_are_raised(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    save_steps(root, 1).close()
    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_steps(root, 2)
    assert whole_steps(manager_of(root)) == [1]


def test_two_managers_of_one_process_are_two_jobs(root: Path) -> None:
    first = save_steps(root, 1)
    with pytest.raises(dcp.CheckpointError, match=f"another run saves in .*process {os.getpid()}"):
        save_steps(root, 2)
    first.close()
    assert whole_steps(save_steps(root, 2)) == [1, 2]


# Full disks.

NEEDS_ROOM = {"make_folder", "create", "write", "allocate", "rename", "link"}
CHANGES_OF_A_SAVE = 29
"""Until the removal of a second step begins."""


class FullDisk(BeforeChange):
    """Refuses whatever takes room, from a change on."""

    def __init__(self, from_change: int) -> None:
        def is_chosen(number: int, operation: Operation) -> bool:
            return number >= from_change and operation.kind in NEEDS_ROOM

        super().__init__(is_chosen, self.refuse)
        self.has_refused = False

    def refuse(self, operation: Operation) -> None:
        self.has_refused = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)


@pytest.mark.filterwarnings("ignore:step .* is not whole", "ignore:step .* is saved, but")
@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize(
    "from_change", range(1, CHANGES_OF_A_SAVE + 1) if IS_NIGHTLY else (5, 8, 12, 15, 20, 29)
)
def test_a_full_disk_costs_no_step_and_room_is_made(
    root: Path, from_change: int, incremental: bool
) -> None:
    save_steps(root, 1, 2, incremental=incremental).close()
    disk = FullDisk(from_change)
    manager = manager_of(root, keep_last=1, incremental=incremental)
    error = None
    with watch_operations([root], disk):
        try:
            manager.save(3, state_of(3))
        except (OSError, dcp.CheckpointException) as raised:
            error = raised
    assert disk.has_refused
    if error is None:
        assert whole_steps(manager) == [3]  # old steps are removed from a full disk, too
    else:
        assert "No space left" in str(error)
        assert [path.name for path in folder_of(root, 3).glob("*.distcp")] == []
        assert whole_steps(manager) == [1, 2]
    manager.save(4, state_of(4))
    assert manager.load_latest(blank()) is not None
    assert whole_steps(manager) == [4]


# Strangers.


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("step-00000002", Path.touch),
        ("step-00000002", lambda path: path.symlink_to("nowhere")),
        ("step-00000002/.metadata", lambda path: path.mkdir(parents=True)),
        ("step-00000002/step.json", lambda path: path.mkdir(parents=True)),
        ("step-00000002/removal.json", lambda path: path.mkdir(parents=True)),
        (".steps.lock", Path.mkdir),
    ],
)
def test_a_stranger_in_the_way_of_a_save_is_named(
    root: Path, name: str, make: Callable[[Path], None]
) -> None:
    save_steps(root, 1).close()
    stranger = root / name
    stranger.unlink(missing_ok=True)
    make(stranger)
    with pytest.raises((OSError, dcp.CheckpointException), match=name):
        save_steps(root, 2)
    assert os.path.lexists(stranger)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of step 2
        assert whole_steps(manager_of(root)) == [1]
        stranger.rename(root / "elsewhere")
        assert whole_steps(save_steps(root, 2)) == [1, 2]


def test_a_step_elsewhere_is_removed_with_its_link(root: Path, tmp_path: Path) -> None:
    save_steps(root, 1).close()
    step = folder_of(root, 1)
    step.rename(tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    with manager_of(root, keep_last=1) as manager:
        assert whole_steps(manager) == [1]
        manager.save(2, state_of(2))
    assert not step.is_symlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert find_leftovers(KnownSteps(RunPlace(root), RetentionPolicy(), "sizes")) == []


# Clocks.


@pytest.mark.parametrize("times", [(0, 0), (2**32, 2**32)], ids=["past", "future"])
def test_the_times_of_files_decide_nothing(root: Path, times: tuple[int, int]) -> None:
    save_steps(root, 1, 2, 3).close()
    for path in [*folder_of(root, 2).iterdir(), folder_of(root, 2)]:
        os.utime(path, times)
    with manager_of(root, keep_last=3) as manager:
        manager.save(4, state_of(4))
        assert whole_steps(manager) == [2, 3, 4]
        loaded = manager.load_latest(blank())
    assert loaded is not None
    assert loaded.number == 4


# Listings.


def test_a_step_that_no_listing_and_no_note_shows_is_saved_again_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 3 was killed before its note, and the store does not list it yet."""
    url = f"memory://unlisted-{tmp_path.name}"
    save_steps(url, 1, 2, 3).close()
    folders = RunPlace(url).open_folders()
    folders.root.remove("latest.json")
    names = ["step-00000001", "step-00000002"]
    with monkeypatch.context() as patch:
        patch.setattr(StepFolders, "folder_names", lambda self: names)
        manager = manager_of(url, keep_last=2)
        loaded = manager.load_latest(blank())
        assert loaded is not None
        assert loaded.number == 2
        with pytest.warns(UserWarning, match="Detected an existing checkpoint in .*step-00000003"):
            manager.save(3, state_of(30))
        assert whole_steps(manager) == [2, 3]
    state = blank()
    assert manager_of(url).load_latest(state) is not None
    assert state["step"] == 30
    assert whole_steps(manager_of(url)) == [2, 3]
