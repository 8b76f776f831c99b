"""Every storage operation of a save, an overwrite and a load fails, one after the other.

For n = 1, 2, 3, ... the n-th operation of a kind fails, until a run has no n-th one: so none is
left out, whatever the engine does. After each run: no silent success. A save that returned is
loaded whole; one that raised leaves the old checkpoint or the new one, whole; a load that returned
has the right values.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as dcp
from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.faults import (
    OPERATION_KINDS,
    Denied,
    Fault,
    FaultyStorage,
    InputOutput,
    Interrupted,
    LostReply,
    LyingSync,
    NoSpace,
    Quota,
    ReadOnly,
    ShortRead,
    ShortWrite,
    Stale,
    SyncFailsOnce,
    TornRename,
    TornWrite,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")

ERRNOS: tuple[Fault, ...] = (
    NoSpace(), Quota(), ReadOnly(), Denied(), Stale(), Interrupted(), InputOutput(),
)  # fmt: skip
OTHERS: tuple[Fault, ...] = (
    ShortRead(), ShortWrite(), TornWrite(), SyncFailsOnce(), LyingSync(),
    LostReply(OSError(5, "no answer")),
)  # fmt: skip
MATTERS = ("create", "write", "sync", "sync_folder", "rename")
"""Operations that no save may return without; the others are also used to clean up after it."""
NEVER = 200
"""More operations of one kind than any run here has."""


def state(fill: int) -> dict[str, Any]:
    return {
        "w": torch.full((30, 20), float(fill)),
        "b": torch.full((5,), fill, dtype=torch.int64),
        "empty": torch.zeros(0),
        "epoch": fill,
    }


class Folder:
    """The checkpoint's folder, put back to what it was before each run. Collective."""

    def __init__(self, path: Path, world: RankWorld) -> None:
        self.path = path
        self.world = world
        self.files: dict[str, bytes] = {}
        self.number = itertools.count()
        self.runs: Counter[str] = Counter()

    def keep(self) -> None:
        if self.world.rank == 0:
            self.files = {file.name: file.read_bytes() for file in self.path.iterdir()}

    def put_back(self) -> None:
        if self.world.rank == 0:
            for file in self.path.iterdir():
                file.unlink()
            for name, data in self.files.items():
                (self.path / name).write_bytes(data)
        self.world.barrier()

    def storage(self) -> FaultyStorage:
        counts = self.path.with_name(f"{self.path.name}-faults") / str(next(self.number))
        return FaultyStorage(self.path, counts)

    def holds(self, *fills: int) -> int:
        """Which of the states the folder has, whole; fails for any other content."""
        for fill in fills:
            try:
                FaultyStorage(self.path, self.path).assert_loads(state(fill))
            except AssertionError:
                continue
            return fill
        raise AssertionError(f"{self.path} holds none of {fills}, whole")


def until_none_is_left(
    folder: Folder, fault: Fault, kind: str, run: Callable[[], bool], **where: Any
) -> Iterator[tuple[int, bool]]:
    """Each n and whether the run returned, as long as there is an n-th operation of the kind."""
    for nth in range(1, NEVER):
        folder.put_back()
        with folder.storage() as storage:
            for sync in {"sync", "sync_folder"} - {kind}:
                # No power failure happens here, and waiting for a disk is most of a small save.
                storage.inject(LyingSync(), on=sync, sticky=True)
            injected = storage.inject(fault, on=kind, nth=nth, **where)
            returned = run()
            folder.world.barrier()
            fired = injected.fired
        if not fired:
            assert returned, (fault, kind, nth)
            return
        folder.runs[kind] += 1
        yield nth, returned
    raise AssertionError(f"{kind}: more than {NEVER} operations")


def cases(faults: tuple[Fault, ...]) -> Iterator[tuple[Fault, str, bool]]:
    for fault, kind, sticky in itertools.product(faults, OPERATION_KINDS, (False, True)):
        if kind in fault.operations:
            yield fault, kind, sticky


def saves(folder: Folder, threads: int) -> Callable[[], bool]:
    def run() -> bool:
        writer = dcp.FileSystemWriter(folder.path, thread_count=threads)
        try:
            dcp.save(state(2), storage_writer=writer)
        except CheckpointException:
            return False
        return True

    return run


def loads(folder: Folder) -> Callable[[], bool]:
    def run() -> bool:
        target: dict[str, Any] = {
            key: torch.zeros_like(value) if key != "epoch" else 0 for key, value in state(1).items()
        }
        try:
            dcp.load(target, checkpoint_id=folder.path)
        except CheckpointException:
            return False
        expected = state(1)
        for key, value in expected.items():
            same = torch.equal(target[key], value) if key != "epoch" else target[key] == value
            assert same, key
        return True

    return run


@pytest.mark.world_size(1, isolation="module")
class TestOnOneRank:
    @pytest.mark.parametrize("faults", [ERRNOS, OTHERS], ids=["errnos", "others"])
    @pytest.mark.parametrize("thread", ["main", "worker"])
    def test_an_overwrite_leaves_the_old_checkpoint_or_the_new_one(
        self, checkpoint_dir: Path, world: RankWorld, thread: str, faults: tuple[Fault, ...]
    ) -> None:
        folder = Folder(checkpoint_dir, world)
        dcp.save(state(1), checkpoint_id=checkpoint_dir)
        folder.keep()
        run = saves(folder, threads=1 if thread == "main" else 2)
        ended: Counter[str] = Counter()
        for fault, kind, sticky in cases(faults):
            where = {"thread": thread, "sticky": sticky}
            for nth, returned in until_none_is_left(folder, fault, kind, run, **where):
                if faults is ERRNOS and kind in MATTERS:
                    assert not returned, (fault, kind, nth)
                held = folder.holds(*((2,) if returned else (1, 2)))
                ended[
                    f"{'returned' if returned else 'raised'}, {'old' if held == 1 else 'new'}"
                ] += 1
        print(f"overwrite, {thread}: {folder.runs.total()} runs {dict(ended)} {dict(folder.runs)}")
        assert folder.runs.total() > 10

    def test_a_rename_that_is_not_atomic_fails_the_save_and_no_load_is_silently_wrong(
        self, checkpoint_dir: Path, world: RankWorld
    ) -> None:
        folder = Folder(checkpoint_dir, world)
        dcp.save(state(1), checkpoint_id=checkpoint_dir)
        folder.keep()
        for _, returned in until_none_is_left(
            folder, TornRename(), "rename", saves(folder, threads=1)
        ):
            assert not returned
            with pytest.raises(CheckpointException, match="no checkpoint in"):
                folder.holds(1, 2)
        assert folder.runs["rename"] == 1

    @pytest.mark.parametrize("faults", [ERRNOS, OTHERS], ids=["errnos", "others"])
    def test_a_first_save_leaves_nothing_or_the_new_checkpoint(
        self, checkpoint_dir: Path, world: RankWorld, faults: tuple[Fault, ...]
    ) -> None:
        folder = Folder(checkpoint_dir, world)
        run = saves(folder, threads=1)
        for fault, kind, sticky in cases(faults):
            for _ in until_none_is_left(folder, fault, kind, run, sticky=sticky):
                if (checkpoint_dir / ".metadata").exists():
                    folder.holds(2)
        print(f"first save: {folder.runs.total()} runs {dict(folder.runs)}")

    @pytest.mark.parametrize("faults", [ERRNOS, OTHERS], ids=["errnos", "others"])
    def test_a_load_gives_the_right_values_or_raises(
        self, checkpoint_dir: Path, world: RankWorld, faults: tuple[Fault, ...]
    ) -> None:
        folder = Folder(checkpoint_dir, world)
        dcp.save(state(1), checkpoint_id=checkpoint_dir)
        folder.keep()
        ended: Counter[bool] = Counter()
        for fault, kind, sticky in cases(faults):
            for _, returned in until_none_is_left(
                folder, fault, kind, loads(folder), sticky=sticky
            ):
                ended[returned] += 1
        print(f"load: {ended[True]} returned, {ended[False]} raised {dict(folder.runs)}")
        assert ended[False] > 10


@pytest.mark.world_size(2, isolation="module")
class TestOnTwoRanks:
    @pytest.mark.parametrize("failing", [0, 1])
    def test_an_overwrite_leaves_the_old_checkpoint_or_the_new_one(
        self, checkpoint_dir: Path, world: RankWorld, failing: int
    ) -> None:
        folder = Folder(checkpoint_dir, world)
        dcp.save(state(1), checkpoint_id=checkpoint_dir)
        folder.keep()
        run = saves(folder, threads=1)
        for kind in OPERATION_KINDS:
            for _, returned in until_none_is_left(
                folder, InputOutput(), kind, run, rank=failing, sticky=True
            ):
                assert world.gather(returned) == [returned, returned]
                folder.holds(*((2,) if returned else (1, 2)))
        print(f"overwrite, rank {failing}: {folder.runs.total()} runs {dict(folder.runs)}")
