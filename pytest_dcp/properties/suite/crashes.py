"""A crash at any operation of a save leaves the old checkpoint or the new one, whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_dcp.faults.crash_models import Model
from pytest_dcp.properties.laws.crash import assert_overwrite_atomic
from pytest_dcp.properties.state_dicts import StateSpec
from pytest_dcp.properties.suite.base import StorageTests
from pytest_dcp.properties.suite.overwriting import OTHERS, SMALL

KILLED: tuple[Model, ...] = ("kill",)
POWERLESS: tuple[Model, ...] = ("posix", "ext4-ordered")


class CrashTests(StorageTests):
    """Saves that are cut off, in one process, of storages that keep files."""

    def test_killed_first_save(self, tmp_path: Path) -> None:
        """A killed first save leaves its complete checkpoint, or none."""
        self._cut_off(tmp_path, None, SMALL, KILLED)

    def test_power_loss_first(self, tmp_path: Path) -> None:
        """A power loss during a first save leaves its complete checkpoint, or none."""
        self._cut_off(tmp_path, None, SMALL, POWERLESS)

    def test_killed_save(self, tmp_path: Path) -> None:
        """A killed save leaves the complete old or new checkpoint."""
        for number, new in enumerate(OTHERS.values()):
            self._cut_off(tmp_path / str(number), SMALL, new, KILLED)

    def test_power_loss(self, tmp_path: Path) -> None:
        """A power loss during a save leaves the complete old or new checkpoint."""
        for number, new in enumerate(OTHERS.values()):
            self._cut_off(tmp_path / str(number), SMALL, new, POWERLESS)

    def _cut_off(
        self, folder: Path, old: StateSpec | None, new: StateSpec, models: Sequence[Model]
    ) -> None:
        before = None if old is None else old.on()
        with self.recording():
            assert_overwrite_atomic(
                before, new.on(), folder, models=models, budget=self.crash_budget, dcp=self.dcp
            )
