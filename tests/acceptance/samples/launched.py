"""One suite with every kind of outcome, to be run on this machine and under torchrun alike."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from session_recorder import note

import pytest_dcp.checkpoint as dcp

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def shared(rank: int) -> list[int]:
    return [rank]


def test_ordinary() -> None:
    note("ordinary", pid=os.getpid())


@pytest.mark.world_size([2, 3, 7])
def test_sizes(rank: int, world_size: int, local_rank: int) -> None:
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == world_size
    note("place", rank=rank, size=world_size, local_rank=local_rank, pid=os.getpid(), **places())


def places() -> dict[str, str]:
    names = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")
    return {name.lower(): os.environ[name] for name in names}


@pytest.mark.world_size(1024, backend="fake")
def test_fake_world(world_size: int) -> None:
    assert world_size == dist.get_world_size() == 1024


@pytest.mark.world_size(3, mesh=(3,))
def test_mesh(device_mesh: Any) -> None:
    assert device_mesh.size() == 3


@pytest.mark.world_size(2)
@pytest.mark.parametrize("word", ["a", "b"])
def test_parameters_and_output(rank: int, word: str) -> None:
    print(f"{word} of rank {rank}")
    assert (rank, word) != (1, "b")


@pytest.mark.world_size(2)
def test_fixtures(rank: int, shared: list[int], tmp_path: Path, request: Any) -> None:
    (tmp_path / "mine").touch()
    assert len(os.listdir(tmp_path)) == 1
    assert shared == [rank]


@pytest.mark.world_size(2)
def test_checkpoint(rank: int, checkpoint_dir: Path) -> None:
    dcp.save({"w": torch.ones(2), "rank": dcp.PerRank(rank)}, checkpoint_id=checkpoint_dir)
    found = dcp.load_without_template(checkpoint_id=checkpoint_dir)
    assert sorted(found["rank"].values()) == [0, 1]


@pytest.mark.world_size(2)
class TestWarm:
    pytestmark = pytest.mark.world_size(2, isolation="module")

    def test_first(self) -> None:
        note("warm", pid=os.getpid())

    def test_second(self) -> None:
        note("warm", pid=os.getpid())


@pytest.mark.world_size(2)
def test_own_rendezvous(rank: int) -> None:
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://")
    dist.barrier()


@pytest.mark.world_size(2)
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(number=st.integers(0, 100))
def test_property(number: int) -> None:
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, number)
    assert seen[0] == seen[1]


@pytest.mark.world_size(2)
@settings(max_examples=50, deadline=None, database=None, derandomize=True)
@given(number=st.integers(0, 100))
def test_false_property(number: int) -> None:
    assert number < 40


@pytest.mark.world_size(2)
def test_exchange(rank: int, world: Any) -> None:
    large = bytes(3_000_000)
    assert world.gather((rank, large)) == [(0, large), (1, large)]


@pytest.mark.world_size(3)
def test_faults(rank: int, world: Any) -> None:
    if rank == 0:
        world.pause(1)
        world.resume(1)
        world.kill(2)
    assert world.gather(rank * 10) == [0, 10, None]


@pytest.mark.world_size(2)
def test_dies(rank: int) -> None:
    print(f"last words of {rank}", flush=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.world_size(2, timeout=2)
def test_hangs(rank: int) -> None:
    if rank == 1:
        time.sleep(1000)
    dist.barrier()


@pytest.mark.world_size(2)
@pytest.mark.xfail(strict=True, raises=ZeroDivisionError)
def test_expected(rank: int) -> None:
    assert 1 // 0


@pytest.mark.world_size(2)
def test_skips() -> None:
    pytest.skip("for a reason")


@pytest.mark.world_size(2)
def test_skips_on_one(rank: int) -> None:
    if rank == 1:
        pytest.skip("alone")


@pytest.mark.world_size(2)
def test_subtests(rank: int, subtests: Any) -> None:
    for case in range(2):
        with subtests.test(case=case):
            assert (rank, case) != (1, 1)


def test_carved_worlds(worlds: Any) -> None:
    with worlds(2) as two, worlds(3) as three:
        assert two.run(dist.get_world_size) == [2, 2]
        assert three.run(dist.get_rank) == [0, 1, 2]


@pytest.mark.launched_only
def test_a_world_that_is_too_large(worlds: Any) -> None:
    with worlds(4):
        pass


@pytest.mark.launched_only
def test_a_forked_child_is_terminated_as_ever() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join()
    assert child.exitcode == -signal.SIGTERM


@pytest.mark.launched_only
def test_a_program_of_a_test_is_no_rank() -> None:
    assert os.environ["PYTEST_DCP_OUTER"] == str(os.getpid())
