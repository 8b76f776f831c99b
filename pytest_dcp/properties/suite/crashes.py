"""A crash at any operation of a save leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_dcp.faults.losses import Model
from pytest_dcp.properties.laws.crash import assert_overwrite_atomic
from pytest_dcp.properties.state_dicts import StateSpec
from pytest_dcp.properties.suite.base import StorageTests
from pytest_dcp.properties.suite.overwriting import OTHERS, SMALL

KILLED: tuple[Model, ...] = ("kill",)
POWERLESS: tuple[Model, ...] = ("posix", "ext4-ordered")


class CrashTests(StorageTests):
    """Saves that are cut off, in one process, of storages that keep files."""

    def test_a_killed_first_save_leaves_it_whole_or_none(self, tmp_path: Path) -> None:
        self._cut_off(tmp_path, None, SMALL, KILLED)

    def test_a_first_save_leaves_it_whole_or_none_when_the_machine_dies(
        self, tmp_path: Path
    ) -> None:
        self._cut_off(tmp_path, None, SMALL, POWERLESS)

    def test_a_killed_save_leaves_the_old_one_or_the_new(self, tmp_path: Path) -> None:
        for number, new in enumerate(OTHERS.values()):
            self._cut_off(tmp_path / str(number), SMALL, new, KILLED)

    def test_a_save_leaves_the_old_one_or_the_new_when_the_machine_dies(
        self, tmp_path: Path
    ) -> None:
        for number, new in enumerate(OTHERS.values()):
            self._cut_off(tmp_path / str(number), SMALL, new, POWERLESS)

    def _cut_off(
        self, folder: Path, old: StateSpec | None, new: StateSpec, models: Sequence[Model]
    ) -> None:
        if not self.keeps_files:
            pytest.skip("the storage keeps no files in a local folder")
        before = None if old is None else old.on()
        assert_overwrite_atomic(
            before, new.on(), folder, models=models, budget=self.crash_budget, dcp=self.dcp
        )
