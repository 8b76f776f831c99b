"""Ranks that die before a group's first operation, or in their first call: they are named in time.

The processes are forks of this one, under the group's default timeout of half an hour.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined] # re-exported by torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate import probe, rendezvous

pytestmark = pytest.mark.filterwarnings("ignore")

RANKS = 3
HEARD_S = 60.0
"""Far below the group's timeout."""
LATE_S = 1.5
"""Many times the period after which a refusal is believed here."""

Act = Callable[[int], object]
"""A rank's action on the signal to begin."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is believed sooner than in earnest, to save time."""
    monkeypatch.setattr(probe, "CONFIRM_S", 0.3)
    monkeypatch.setattr(probe, "AGAIN_S", 0.1)
    monkeypatch.setattr(probe, "QUIET_LATER_S", 0.1)


@dataclass
class Ranks:
    """Forked processes, each a rank of a gloo group."""

    children: list[int]
    place: Path
    going: int

    def begin(self) -> None:
        """Signal all ranks to act; saving ranks wait for the others."""
        os.write(self.going, b"!" * RANKS)

    def kill(self, rank: int) -> None:
        """End a rank as the kernel's memory killer does, and reap it."""
        os.kill(self.children[rank], signal.SIGKILL)
        os.waitpid(self.children[rank], 0)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.children[rank], number)

    def read_told(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """How the ranks' acts ended, each within `HEARD_S`."""
        until_s = time.monotonic() + HEARD_S
        files = [self.place / f"told-{rank}" for rank in ranks]
        while not all(file.exists() for file in files):
            assert time.monotonic() < until_s, "a rank waits for one that has ended"
            time.sleep(0.01)
        return [json.loads(file.read_text()) for file in files]


@contextmanager
def ranks_that(act: Act, place: Path) -> Iterator[Ranks]:
    """Ranks with a group, that have called nothing of the engine yet."""
    children: list[int] = []
    ready, getting_ready = os.pipe()
    go, going = os.pipe()
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            run_rank(rank, act, place, getting_ready, go)
        children.append(child)
    try:
        for _ in children:
            assert os.read(ready, 1)
        yield Ranks(children, place, going)
    finally:
        for pipe in (ready, getting_ready, go, going):
            os.close(pipe)
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            except (ProcessLookupError, ChildProcessError):
                continue


def run_rank(rank: int, act: Act, place: Path, getting_ready: int, go: int) -> None:
    """One rank's life; how its act ended is left in a file. Does not return."""
    try:
        faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
        signal.alarm(int(2 * HEARD_S))
        torch.set_num_threads(1)
        store = FileStore(str(place / "store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
        dist.barrier()
        os.write(getting_ready, b"!")
        assert os.read(go, 1)
        told: dict[str, Any] = {"error": None}
        try:
            act(rank)
        except dcp.CheckpointException as error:
            failures = {r: type(failure).__name__ for r, (failure, _) in error.failures.items()}
            told = {"error": str(error), "named": failures}
        whole = place / f"told-{rank}.whole"
        whole.write_text(json.dumps(told))
        whole.rename(place / f"told-{rank}")
        time.sleep(2 * HEARD_S)  # until the test is over: only the victim may die
    except BaseException:  # noqa: BLE001 - printed; the test then misses this rank's file
        traceback.print_exc()
    finally:
        os._exit(0)


def sleep_on(rank: int) -> None:
    time.sleep(2 * HEARD_S)


def save_to(place: Path, group: dist.ProcessGroup | None = None) -> None:
    dcp.save({"w": torch.ones(8)}, checkpoint_id=place / "checkpoint", process_group=group)


def assert_named(told: Sequence[dict[str, Any]], victim: int, text: str) -> None:
    for one in told:
        assert one["named"] == {str(victim): "RankEndedError"}, one
        assert text in one["error"], one


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("others_wait", [False, True], ids=["before the others", "while they wait"])
def test_a_rank_killed_before_its_first_operation_is_named(
    tmp_path: Path, victim: int, others_wait: bool
) -> None:
    def act(rank: int) -> None:
        sleep_on(rank) if rank == victim else save_to(tmp_path)

    with ranks_that(act, tmp_path) as ranks:
        if others_wait:
            ranks.begin()
            time.sleep(0.5)
        ranks.kill(victim)
        if not others_wait:
            ranks.begin()
        told = ranks.read_told([rank for rank in range(RANKS) if rank != victim])
    assert_named(told, victim, "where gloo did: its process has ended")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("step", ["before it is present", "once it is present"])
def test_a_rank_killed_within_its_first_call_is_named(
    tmp_path: Path, victim: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = rendezvous.announce_presence

    def say_and_die(group: dist.ProcessGroup, rank: int, coordinator_rank: int) -> None:
        if rank == victim and step == "before it is present":
            os.kill(os.getpid(), signal.SIGKILL)
        say(group, rank, coordinator_rank)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(rendezvous, "announce_presence", say_and_die)
    with ranks_that(lambda rank: save_to(tmp_path), tmp_path) as ranks:
        ranks.begin()
        told = ranks.read_told([rank for rank in range(RANKS) if rank != victim])
    assert_named(told, victim, "its process" if step == "once it is present" else "where gloo did")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_stopped_before_its_first_operation_is_waited_for(
    tmp_path: Path, victim: int
) -> None:
    with ranks_that(lambda rank: save_to(tmp_path), tmp_path) as ranks:
        ranks.signal(victim, signal.SIGSTOP)
        ranks.begin()
        time.sleep(LATE_S)
        assert not list(tmp_path.glob("told-*"))
        ranks.signal(victim, signal.SIGCONT)
        told = ranks.read_told(range(RANKS))
    assert [one["error"] for one in told] == [None] * RANKS


def test_a_late_rank_without_descriptors_is_waited_for_and_unharmed(tmp_path: Path) -> None:
    """gloo ends a process that cannot accept a connection: it must not be given one."""

    def act(rank: int) -> None:
        if rank == 1:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            opened = [os.open(os.devnull, os.O_RDONLY)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 1, hard))
            with pytest.raises(OSError, match="Too many open files"):
                os.open(os.devnull, os.O_RDONLY)
            time.sleep(LATE_S)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        save_to(tmp_path)
        dist.barrier()

    with ranks_that(act, tmp_path) as ranks:
        ranks.begin()
        told = ranks.read_told(range(RANKS))
    assert [one["error"] for one in told] == [None] * RANKS


def test_a_rank_that_destroyed_its_group_is_named(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        if rank == 1:
            dist.destroy_process_group()
            sleep_on(rank)
        save_to(tmp_path)

    with ranks_that(act, tmp_path) as ranks:
        ranks.begin()
        told = ranks.read_told([0, 2])
    assert_named(told, 1, "or it has destroyed the process group")


def test_a_rank_of_a_subgroup_is_named_by_its_rank_there(tmp_path: Path) -> None:
    def act(rank: int) -> None:
        group: Any = dist.new_group([0, 2])
        dist.barrier()
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            save_to(tmp_path, group)

    with ranks_that(act, tmp_path) as ranks:
        ranks.begin()
        told = ranks.read_told([0])
    assert_named(told, 1, "where gloo did")


def test_a_rank_of_a_group_that_connects_lazily_is_waited_for_until_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection has shown that the address leads to it, so nothing is concluded."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")

    def act(rank: int) -> None:
        group: Any = dist.new_group(timeout=timedelta(seconds=LATE_S))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        save_to(tmp_path, group)

    with ranks_that(act, tmp_path) as ranks:
        ranks.begin()
        told = ranks.read_told([0, 2])
    for one in told:
        assert one["named"] == {"1": "RankSilentError"}, one
