"""A rank is killed while it copies its state: the others get an error from their futures."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.staging import AsyncStager

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate import presence, probe, rendezvous
from pytest_dcp._engine.coordinate.frame import Head
from pytest_dcp._engine.coordinate.machines import machine
from pytest_dcp._engine.coordinate.peer_side import PeerSide
from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

HEARD_S = 30.0
"""Far below the group's timeout, which is half an hour; a background process takes a while."""


def copying() -> None:
    """Where a rank dies."""


class Stager(AsyncStager):
    """Copies nothing, in a while."""

    def __init__(self, meet: Callable[[], object], *, after_s: float) -> None:
        self.meet = meet
        self.after_s = after_s

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.meet()
        time.sleep(self.after_s)
        copying()
        return state_dict


def begun(
    world: RankWorld, folder: Path, first: int, kind: AsyncCheckpointerType, after_s: float
) -> Future[Any]:
    """The upload of a save that rank `first` begins, the others once it copies."""
    if world.rank != first:
        world.barrier()
    saving = dcp.async_save(
        {"w": torch.ones(3)},
        checkpoint_id=folder,
        async_stager=Stager(
            world.barrier if world.rank == first else lambda: None, after_s=after_s
        ),
        async_checkpointer_type=kind,
    )
    return saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving


def assert_named(victim: int, uploading: Future[Any], folder: Path) -> None:
    error = uploading.exception(HEARD_S)
    assert isinstance(error, CheckpointException)
    assert set(error.failures) == {victim}
    assert f"rank {victim}" in str(error)
    assert "ended" in str(error)
    assert not (folder / ".metadata").exists()


@pytest.mark.world_size(3)
@pytest.mark.parametrize("kind", AsyncCheckpointerType)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("after_s", [0.0, 0.7])
def test_a_rank_that_is_killed_while_it_copies_is_named(
    world: RankWorld,
    rank: int,
    checkpoint_dir: Path,
    victim: int,
    after_s: float,
    kind: AsyncCheckpointerType,
) -> None:
    """In the group's first operation; the coordinator began it."""
    world.kill(victim, at=f"{__name__}:copying")
    slow_s = after_s if rank == victim else 0.0
    assert_named(victim, begun(world, checkpoint_dir, 0, kind, slow_s), checkpoint_dir)


@pytest.mark.world_size(3)
def test_one_that_began_before_the_coordinator_is_named_in_a_later_save(
    world: RankWorld, checkpoint_dir: Path
) -> None:
    thread = AsyncCheckpointerType.THREAD
    begun(world, checkpoint_dir / "one", 1, thread, 0.0).result(HEARD_S)
    world.barrier()
    world.kill(1, at=f"{__name__}:copying")
    two = checkpoint_dir / "two"
    assert_named(1, begun(world, two, 1, thread, 0.0), two)


def save_killed_before_it_meets(world: RankWorld, victim: int, folder: Path) -> str:
    """The text of a save's failure, which names the rank that was killed, and soon."""
    side = "peer_side:PeerSide.join" if victim else "coordinator_side:CoordinatorSide.join"
    world.kill(victim, at=f"pytest_dcp._engine.coordinate.{side}")
    began_s = time.monotonic()
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"w": torch.ones(3)}, checkpoint_id=folder)
    assert time.monotonic() - began_s < HEARD_S
    assert set(caught.value.failures) == {victim}
    assert f"rank {victim}" in str(caught.value)
    return str(caught.value)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_before_it_meets_the_others_is_named(
    world: RankWorld, checkpoint_dir: Path, victim: int
) -> None:
    """In the group's first operation, when no rank has been connected to the coordinator yet.

    The others see that its process has ended, or have its address, at which nothing answers.
    """
    assert "RankEndedError" in save_killed_before_it_meets(world, victim, checkpoint_dir)


@pytest.mark.world_size(3)
@pytest.mark.parametrize("kind", AsyncCheckpointerType)
def test_one_that_is_killed_while_it_copies_before_the_coordinator_comes_is_named(
    world: RankWorld, checkpoint_dir: Path, kind: AsyncCheckpointerType
) -> None:
    world.kill(1, at=f"{__name__}:copying")
    assert_named(1, begun(world, checkpoint_dir, 1, kind, 0.0), checkpoint_dir)


@pytest.fixture
def apart(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank is on a machine of its own, as far as it sees."""
    scope = f"{machine()}/seen by rank {rank} alone"
    monkeypatch.setattr(presence, "_scope", lambda: scope)
    monkeypatch.setattr(rendezvous, "local_only", lambda _: False)
    monkeypatch.setattr(probe, "REFUSED_S", 3.0)


@pytest.mark.world_size(3)
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_of_another_machine_that_is_killed_before_it_meets_the_others_is_named(
    world: RankWorld, checkpoint_dir: Path, victim: int
) -> None:
    """In the group's first operation; no rank sees the process of another."""
    text = save_killed_before_it_meets(world, victim, checkpoint_dir)
    assert ("nothing listens at its address" if victim else "ended") in text


@pytest.mark.world_size(3)
@pytest.mark.usefixtures("apart")
def test_a_late_rank_of_another_machine_is_waited_for(
    world: RankWorld, rank: int, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has begun, and comes after the time in which a rank that ended is named."""
    monkeypatch.setattr(probe, "REFUSED_S", 0.1)
    monkeypatch.setattr(probe, "CONFIRM_S", 0.1)
    whole = PeerSide.join

    def late(peer_side: PeerSide, head: Head) -> object:
        time.sleep(2.0)
        return whole(peer_side, head)

    if rank == 1:
        monkeypatch.setattr(PeerSide, "join", late)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=checkpoint_dir)
    assert (checkpoint_dir / ".metadata").exists()
