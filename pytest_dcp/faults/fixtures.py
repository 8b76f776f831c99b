"""The fixture `faulty_storage`. Imports no torch: a suite without worlds pays nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from pytest_dcp.api import current_rank

if TYPE_CHECKING:
    from pytest_dcp.faults.storage import FaultyStorage


@pytest.fixture
def faulty_storage(request: pytest.FixtureRequest, checkpoint_dir: Path) -> Iterator[FaultyStorage]:
    """A storage that fails on command, the same in all ranks: inject, wrap, assert_loads.

    At its end everything that hangs is released, and an injection that never fired fails the test.

        @pytest.mark.world_size(2)
        def test_a_full_disk_leaves_the_old_checkpoint(checkpoint_dir, faulty_storage):
            dcp.save({"w": torch.ones(4)}, checkpoint_id=checkpoint_dir)
            faulty_storage.inject(NoSpace(), on="write", rank=0)
            with pytest.raises(dcp.CheckpointException, match="No space left"):
                dcp.save({"w": torch.zeros(4)}, checkpoint_id=checkpoint_dir)
            faulty_storage.assert_loads({"w": torch.ones(4)})
    """
    from pytest_dcp.faults.crashes.crash_state import Search
    from pytest_dcp.faults.options import read_fault_options
    from pytest_dcp.faults.storage import FaultyStorage

    options = read_fault_options(request.config)
    rank = current_rank()
    with contextlib.ExitStack() as stack:
        if rank is None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="dcp-faults-")))
        else:
            folder = rank.scratch_dir
        search = Search(options.budget, options.replay or None, folder / "crash-states")
        storage = FaultyStorage(checkpoint_dir, folder, search=search)
        renewed = contextlib.nullcontext() if rank is None else rank.renew_for_examples(storage)
        with storage, renewed:
            yield storage
        # pytest keeps the exception of a test that failed: then that is what counts.
        if getattr(sys, "last_value", None) is None:
            storage.check()
        # In every rank, also in one whose test failed: ranks skip together or not at all.
        if search.has_replayed() is False:
            pytest.skip(f"--dcp-fault-replay: {search.replay} is none of the states that it tries")
