"""Several ranks save and load together: any layout into any other, by more or fewer ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.tensor import Replicate, Shard

from pytest_dcp.properties.laws.crash import assert_overwrite_atomic
from pytest_dcp.properties.laws.round_trips import assert_meta_load
from pytest_dcp.properties.laws.steps import enter, load, save
from pytest_dcp.properties.meshes import MeshSpec
from pytest_dcp.properties.placements import Layout
from pytest_dcp.properties.state_dicts import StateSpec
from pytest_dcp.properties.suite.base import StorageTests
from pytest_dcp.properties.tensors import TensorSpec

SIZE = 4
SQUARE = MeshSpec((2, 2))
LAYOUTS = (
    Layout(),
    Layout(MeshSpec((SIZE,))),
    *(Layout(MeshSpec((SIZE,)), (one,)) for one in (Replicate(), Shard(0), Shard(1))),
    Layout(MeshSpec((3,)), (Shard(0),)),
    Layout(SQUARE, (Shard(0), Shard(1))),
    Layout(SQUARE, (Shard(1), Shard(1))),
    Layout(SQUARE, (Replicate(), Shard(0))),
)
STATE = StateSpec(
    {
        "even": TensorSpec((8, 4), content="random"),
        "uneven": TensorSpec((7, 5), content="special"),
        "short": TensorSpec((1, 3), seed=5),
        "empty": TensorSpec((0, 2)),
        "scalar": TensorSpec(),
        "value": {"step": 3, "name": "x"},
    }
)


class WorldTests(StorageTests):
    """Round trips between layouts, in one world whose first ranks take part."""

    @pytest.mark.world_size(SIZE, isolation="module")
    def test_layouts(self, checkpoint_dir: Path) -> None:
        """Any layout loads in any other."""
        self.needs_sharing()
        placed = [STATE.on(layout) for layout in LAYOUTS]
        enter(*placed)
        for number, saved in enumerate(placed):
            save(self.dcp, saved, checkpoint_dir / str(number))
            for loaded in placed:
                load(self.dcp, loaded, checkpoint_dir / str(number), f"loading what {saved} was")

    @pytest.mark.world_size(SIZE, isolation="module")
    def test_sharded_meta(self, checkpoint_dir: Path) -> None:
        """Sharded tensors on the meta device become real."""
        self.needs_sharing()
        saved, loaded = STATE.on(LAYOUTS[3]), STATE.on(LAYOUTS[6])
        assert_meta_load(saved, loaded, checkpoint_dir, dcp=self.dcp)

    @pytest.mark.world_size(2, isolation="module")
    def test_crash_of_2_ranks(self, checkpoint_dir: Path) -> None:
        """A crash of two ranks leaves the complete old or new checkpoint."""
        self.needs_sharing()
        two = Layout(MeshSpec((2,)), (Shard(0),))
        old, new = (StateSpec({"w": TensorSpec((4,), seed=n)}).on(two) for n in (1, 2))
        with self.recording():
            assert_overwrite_atomic(
                old, new, checkpoint_dir, budget=self.crash_budget, dcp=self.dcp
            )
