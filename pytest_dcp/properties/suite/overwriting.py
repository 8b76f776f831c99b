"""A checkpoint saved over another replaces it; storages can be reused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pytest_dcp.properties.differences import assert_state_dict_equal
from pytest_dcp.properties.laws.engine import expected_warnings
from pytest_dcp.properties.laws.round_trips import assert_round_trip
from pytest_dcp.properties.laws.saves import assert_idempotent_save
from pytest_dcp.properties.placed import empty_state
from pytest_dcp.properties.state_dicts import StateSpec
from pytest_dcp.properties.suite.base import StorageTests, files_of
from pytest_dcp.properties.tensors import TensorSpec

SMALL = StateSpec({"w": TensorSpec((3,), seed=1), "step": 1})
OTHERS = {
    "the same shapes": StateSpec({"w": TensorSpec((3,), seed=2), "step": 2}),
    "a larger one": StateSpec({"w": TensorSpec((300,), seed=2), "more": TensorSpec((5, 5))}),
    "another dtype": StateSpec({"w": TensorSpec((3,), torch.int64, seed=2)}),
}
SEVERAL = 8
"""Number of concurrent readers."""


class OverwritingTests(StorageTests):
    """Saves to one place, one after the other, and concurrent loads."""

    def test_last_save_wins(self, tmp_path: Path) -> None:
        """A load gives the last save."""
        for state in (SMALL, *OTHERS.values(), SMALL):
            assert_round_trip(state.on(), state.on(), tmp_path, dcp=self.dcp)

    def test_saved_again(self, tmp_path: Path) -> None:
        """Saving a loaded state makes the same checkpoint."""
        assert_idempotent_save(SMALL.on(), tmp_path, dcp=self.dcp)

    def test_no_leftovers(self, tmp_path: Path) -> None:
        """A replaced checkpoint leaves nothing behind."""
        larger = OTHERS["a larger one"]
        assert_round_trip(SMALL.on(), SMALL.on(), tmp_path / "fresh", dcp=self.dcp)
        for state in (larger, SMALL):
            assert_round_trip(state.on(), state.on(), tmp_path / "again", dcp=self.dcp)
        sizes = [
            sorted(path.stat().st_size for path in files_of(tmp_path / place))
            for place in ("fresh", "again")
        ]
        assert sizes[0] == sizes[1]

    def test_reuse(self, tmp_path: Path) -> None:
        """One writer and one reader can be used many times."""
        writer, reader = self.make_writer(tmp_path), self.make_reader(tmp_path)
        place = self.checkpoint_id(tmp_path)
        for state in (SMALL, *OTHERS.values(), SMALL):
            target = empty_state(state.build())
            with expected_warnings():
                self.engine.save(state.build(), storage_writer=writer, checkpoint_id=place)
                self.engine.load(target, storage_reader=reader, checkpoint_id=place)
            assert_state_dict_equal(target, state.build())

    def test_parallel_loads(self, tmp_path: Path) -> None:
        """Several threads can load at once."""
        state = StateSpec({f"{n}": TensorSpec((50, n), seed=n) for n in range(20)})
        assert_round_trip(state.on(), state.on(), tmp_path, dcp=self.dcp)

        def loaded(number: int) -> None:
            target = empty_state(state.build())
            self.dcp.load(target, checkpoint_id=tmp_path)
            assert_state_dict_equal(target, state.build())

        with expected_warnings(), ThreadPoolExecutor(SEVERAL) as pool:
            list(pool.map(loaded, range(SEVERAL)))
