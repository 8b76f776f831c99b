"""A rank that is killed while it copies its state: the others hear of it, in their futures."""

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.staging import AsyncStager

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

HEARD_S = 30.0
"""Far below the group's timeout, which is half an hour; a background process takes a while."""


def copying() -> None:
    """Where a rank dies."""


class Stager(AsyncStager):
    """Copies at once, or in a while."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.after_s)
        copying()
        return state_dict


@pytest.mark.world_size(3)
@pytest.mark.parametrize("kind", AsyncCheckpointerType)
@pytest.mark.parametrize(
    ("victim", "after_s"), [(1, 1.0), (0, 1.0), (0, 0.0)], ids=["peer", "coordinator", "at once"]
)
def test_a_rank_that_is_killed_while_it_copies_is_named(
    world: Any,
    rank: int,
    checkpoint_dir: Path,
    victim: int,
    after_s: float,
    kind: AsyncCheckpointerType,
) -> None:
    """In the first operation of the group; a coordinator also before anybody can have met it."""
    world.kill(victim, at=f"{__name__}:copying")
    started_s = time.monotonic()
    saving = dcp.async_save(
        {"w": torch.ones(3)},
        checkpoint_id=checkpoint_dir,
        async_stager=Stager(after_s if rank == victim else 0.0),
        async_checkpointer_type=kind,
    )
    uploading = saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving
    assert isinstance(uploading, Future)
    error = uploading.exception(HEARD_S)
    assert isinstance(error, CheckpointException)
    assert set(error.failures) == {victim}
    assert f"rank {victim}" in str(error)
    assert "ended" in str(error)
    assert time.monotonic() - started_s < HEARD_S
    assert not (checkpoint_dir / ".metadata").exists()
