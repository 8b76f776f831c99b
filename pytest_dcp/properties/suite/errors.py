"""Failures are raised, and the old checkpoint stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from pytest_dcp.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from pytest_dcp.properties.differences import differences
from pytest_dcp.properties.laws.engine import expected_warnings
from pytest_dcp.properties.laws.round_trips import assert_round_trip
from pytest_dcp.properties.placed import empty_state
from pytest_dcp.properties.state_dicts import StateSpec
from pytest_dcp.properties.suite.base import StorageTests, files_of
from pytest_dcp.properties.tensors import TensorSpec

OLD = StateSpec({"w": TensorSpec((40,), seed=1), "step": 1})
NEW = StateSpec({"w": TensorSpec((40,), seed=2), "step": 2})
STRIDE = 29
"""Bytes from one flipped bit to the next: prime, so that every part of every record is hit."""
ERRORS: tuple[type[BaseException], ...] = (Exception, CheckpointException)
"""CheckpointException is no Exception."""


class Refuses(DefaultSavePlanner):
    """A planner that cannot provide the data of one item."""

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "w":
            raise OSError("the planner has no data for w")
        return super().resolve_data(write_item)


class Drops(DefaultLoadPlanner):
    """A planner that cannot accept the data of one item."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        raise OSError("the planner has no tensor for w")


class ErrorTests(StorageTests):
    """Failures in one process."""

    def _loads(self, state: StateSpec, folder: Path) -> None:
        target = empty_state(state.build())
        with expected_warnings():
            self.dcp.load(target, checkpoint_id=folder)
        assert not differences(target, state.build())

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        """A missing checkpoint is an error."""
        # An existing one loads: the storage does not fail for another reason.
        assert_round_trip(OLD.on(), OLD.on(), tmp_path / "one", dcp=self.dcp)
        with expected_warnings(), pytest.raises(ERRORS):
            self.dcp.load(OLD.build(), checkpoint_id=tmp_path / "none")

    def test_missing_key(self, tmp_path: Path) -> None:
        """A missing key is an error that names the key."""
        assert_round_trip(OLD.on(), OLD.on(), tmp_path, dcp=self.dcp)
        with expected_warnings(), pytest.raises(ERRORS, match="absent"):
            self.dcp.load({"absent": torch.ones(2)}, checkpoint_id=tmp_path)

    def test_other_shape(self, tmp_path: Path) -> None:
        """Another shape is an error that names the key."""
        assert_round_trip(OLD.on(), OLD.on(), tmp_path, dcp=self.dcp)
        with expected_warnings(), pytest.raises(ERRORS, match="w"):
            self.dcp.load({"w": torch.ones(41)}, checkpoint_id=tmp_path)

    def test_failing_save(self, tmp_path: Path) -> None:
        """A planner without the data fails the save, and the old checkpoint stays."""
        assert_round_trip(OLD.on(), OLD.on(), tmp_path, dcp=self.dcp)
        writer = self.make_writer(tmp_path)
        with expected_warnings(), pytest.raises(ERRORS, match="no data for w"):
            self.engine.save(NEW.build(), storage_writer=writer, planner=Refuses())
        self._loads(OLD, tmp_path)

    def test_failing_load(self, tmp_path: Path) -> None:
        """A planner that cannot take the data fails the load."""
        assert_round_trip(OLD.on(), OLD.on(), tmp_path, dcp=self.dcp)
        reader = self.make_reader(tmp_path)
        with expected_warnings(), pytest.raises(ERRORS, match="no tensor for w"):
            self.engine.load(OLD.build(), storage_reader=reader, planner=Drops())

    def test_missing_file(self, tmp_path: Path) -> None:
        """A missing file is an error."""
        self.needs_files()
        assert_round_trip(OLD.on(), OLD.on(), tmp_path / "whole", dcp=self.dcp)
        for path in files_of(tmp_path / "whole"):
            content = path.read_bytes()
            path.unlink()
            with expected_warnings(), pytest.raises(ERRORS):
                self.dcp.load(empty_state(OLD.build()), checkpoint_id=tmp_path / "whole")
            path.write_bytes(content)
        self._loads(OLD, tmp_path / "whole")

    def test_short_file(self, tmp_path: Path) -> None:
        """A file that ends early is an error."""
        self.needs_files()
        assert_round_trip(OLD.on(), OLD.on(), tmp_path, dcp=self.dcp)
        for path in files_of(tmp_path):
            content = path.read_bytes()
            for part in (0, len(content) // 4, len(content) // 2):
                path.write_bytes(content[:part])
                with expected_warnings(), pytest.raises(ERRORS):
                    self.dcp.load(empty_state(OLD.build()), checkpoint_id=tmp_path)
            path.write_bytes(content)

    def test_flipped_bits(self, tmp_path: Path) -> None:
        """A flipped bit never gives a wrong tensor."""
        self.needs_files()
        assert_round_trip(OLD.on(), OLD.on(), tmp_path, dcp=self.dcp)
        wrong = []
        for path in files_of(tmp_path):
            content = path.read_bytes()
            for offset in range(0, len(content), STRIDE):
                flipped = content[offset] ^ (1 << offset % 8)
                path.write_bytes(content[:offset] + bytes([flipped]) + content[offset + 1 :])
                wrong += [
                    f"{path.name}:{offset}: {one}" for one in self._find_silent_errors(tmp_path)
                ]
            path.write_bytes(content)
        assert not wrong

    def _find_silent_errors(self, folder: Path) -> list[str]:
        target = empty_state(OLD.build())
        try:
            with expected_warnings():
                self.dcp.load(target, checkpoint_id=folder)
        except ERRORS:
            return []
        return [str(one) for one in differences(target, OLD.build())]
