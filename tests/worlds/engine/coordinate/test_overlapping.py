"""Operations of a group that are under way at once: the ranks' parts belong together."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate import OperationCall, OutOfStepError, StepError, Team, team_of
from pytest_dcp.checkpoint.api import CheckpointException
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from support.states import EXISTING, without_warnings

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld

pytestmark = [
    pytest.mark.world_size(2, timeout=200),
    pytest.mark.filterwarnings(f"ignore:{EXISTING}"),
]

WAIT_S = 120
PROMPT_S = 10.0
"""For what happens at once, on a machine with other work; a group's timeout is half an hour."""
THREAD, PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS


def numbered(n: float, rank: int) -> dict[str, Any]:
    """The n-th state: each rank has a tensor of its own, and all have one in common."""
    return {f"own{rank}": torch.full((100,), float(n)), "common": torch.full((3,), float(n))}


def started(state: dict[str, Any], folder: Path | None = None, **options: Any) -> Future[Metadata]:
    begun = dcp.async_save(state, checkpoint_id=folder, **options)
    return begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun


def loaded(folder: Path, rank: int, **options: Any) -> float:
    """The number of the state that a load gives; every part must have the same."""
    target = numbered(-1.0, rank)
    dcp.load(target, checkpoint_id=folder, **options)
    values = {float(value) for tensor in target.values() for value in tensor}
    assert len(values) == 1
    return values.pop()


class Held(dcp.DefaultSavePlanner):
    """Plans when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def create_local_plan(self) -> dcp.SavePlan:
        assert self.go_on.wait(WAIT_S)
        return super().create_local_plan()


@pytest.mark.parametrize("folders", [1, 3])
def test_saves_in_flight_are_made_in_the_order_of_their_calls(
    rank: int, checkpoint_dir: Path, folders: int
) -> None:
    for turn in range(8):
        numbers = [10 * turn + n for n in range(3)]
        saving = []
        for n in numbers:
            time.sleep(0.004 * (rank == n % 2))
            folder = checkpoint_dir / f"f{n % folders}"
            saving.append(started(numbered(n, rank), folder))
        for future in saving:
            future.result(WAIT_S)
        dist.barrier()
        for n in numbers[-folders:]:
            assert loaded(checkpoint_dir / f"f{n % folders}", rank) == n


def test_a_save_waits_for_those_before_it_and_a_load_for_those_to_its_folder(
    rank: int, checkpoint_dir: Path
) -> None:
    one, two = checkpoint_dir / "one", checkpoint_dir / "two"
    dcp.save(numbered(1, rank), checkpoint_id=one)
    dcp.save(numbered(2, rank), checkpoint_id=two)
    held = Held()
    saving = started(numbered(3, rank), one, planner=held)
    assert loaded(two, rank) == 2
    assert not saving.done()
    threading.Timer(0.3, held.go_on.set).start()
    assert loaded(one, rank) == 3
    held.go_on.clear()
    saving = started(numbered(4, rank), one, planner=held)
    threading.Timer(0.3, held.go_on.set).start()
    dcp.save(numbered(5, rank), checkpoint_id=one)
    assert saving.done()
    assert loaded(one, rank) == 5


def test_one_writer_serves_saves_to_several_folders(rank: int, checkpoint_dir: Path) -> None:
    one, two, held = checkpoint_dir / "one", checkpoint_dir / "two", Held()
    writer = dcp.FileSystemWriter(one)
    first = started(numbered(1, rank), storage_writer=writer, planner=held)
    second = started(numbered(2, rank), two, storage_writer=writer)
    held.go_on.set()
    first.result(WAIT_S)
    second.result(WAIT_S)
    assert loaded(one, rank) == 1
    assert loaded(two, rank) == 2


def test_threads_and_processes_save_one_after_another(rank: int, checkpoint_dir: Path) -> None:
    kinds = [PROCESS, THREAD, PROCESS, PROCESS, THREAD]
    saving = [
        started(numbered(n, rank), checkpoint_dir, async_checkpointer_type=kind)
        for n, kind in enumerate(kinds)
    ]
    dcp.save(numbered(5, rank), checkpoint_id=checkpoint_dir)
    assert all(future.done() for future in saving)
    assert loaded(checkpoint_dir, rank) == 5
    writer = dcp.FileSystemWriter(checkpoint_dir)
    last = started(
        numbered(6, rank),
        checkpoint_dir / "other",
        storage_writer=writer,
        async_checkpointer_type=PROCESS,
    )
    assert loaded(checkpoint_dir / "other", rank) == 6
    last.result(WAIT_S)


@pytest.mark.parametrize("seed", range(3))
def test_a_program_of_saves_and_loads_is_as_if_they_were_made_one_by_one(
    rank: int, checkpoint_dir: Path, seed: int
) -> None:
    """The same calls on each rank, at other times."""
    program, pause = random.Random(seed), random.Random(2 * seed + rank)
    groups = [dist.group.WORLD, dist.new_group()]
    saved: dict[str, int] = {}
    saving: list[Future[Metadata]] = []
    for n in range(40):
        name = program.choice("abc")
        folder, group = checkpoint_dir / name, groups["abc".index(name) % 2]
        verb = program.choice(["save", "async", "async", "load"])
        time.sleep(pause.choice([0, 0, 0.005]))
        if verb == "save":
            dcp.save(numbered(n, rank), checkpoint_id=folder, process_group=group)
        elif verb == "async":
            saving.append(started(numbered(n, rank), folder, process_group=group))
        elif name in saved:
            assert loaded(folder, rank, process_group=group) == saved[name]
        if verb != "load":
            saved[name] = n
    for future in saving:
        future.result(WAIT_S)


def test_a_hook_may_save_and_load_beside_its_own_save(rank: int, checkpoint_dir: Path) -> None:
    inner = checkpoint_dir / "inner"

    class Nested(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> dcp.SavePlan:
            dcp.save(numbered(1, rank), checkpoint_id=inner)
            assert loaded(inner, rank) == 1
            return super().create_local_plan()

    dcp.save(numbered(2, rank), checkpoint_id=checkpoint_dir / "outer", planner=Nested())
    started(numbered(3, rank), checkpoint_dir / "outer", planner=Nested()).result(WAIT_S)
    assert loaded(checkpoint_dir / "outer", rank) == 3


# Ranks that do not call the same.


def failure(operation: Callable[[], object]) -> StepError:
    """The error of an operation, which fails in time."""
    began_s = time.monotonic()
    with pytest.raises(CheckpointException) as caught:
        operation()
    assert time.monotonic() - began_s < PROMPT_S
    assert isinstance(caught.value, StepError)
    return caught.value


def test_different_folders_are_reported_to_every_rank(rank: int, checkpoint_dir: Path) -> None:
    folder = checkpoint_dir / f"of{rank}"
    error = failure(lambda: dcp.save(numbered(1, rank), checkpoint_id=folder))
    assert isinstance(error, OutOfStepError)
    assert (
        f"rank 1 runs 'save' with '{checkpoint_dir / 'of1'}' where the coordinator runs it with "
        f"'{checkpoint_dir / 'of0'}'"
    ) in str(error)
    assert not list(checkpoint_dir.glob("*/*.distcp"))
    dcp.save(numbered(2, rank), checkpoint_id=checkpoint_dir / "same")
    assert loaded(checkpoint_dir / "same", rank) == 2
    dcp.save(numbered(3, rank), checkpoint_id=checkpoint_dir / "other")
    error = failure(lambda: loaded(checkpoint_dir / ("same" if rank else "other"), rank))
    for name, who in (("same", "rank 1"), ("other", "rank 0")):
        assert f"{who}: {checkpoint_dir / name}" in str(error)
    assert loaded(checkpoint_dir / "same", rank) == 2


def test_one_folder_may_have_two_names(rank: int, checkpoint_dir: Path, world: RankWorld) -> None:
    (checkpoint_dir / "real").mkdir(exist_ok=True)
    if rank == 1:
        (checkpoint_dir / "link").symlink_to(checkpoint_dir / "real")
    world.barrier()
    dcp.save(numbered(1, rank), checkpoint_id=checkpoint_dir / ("link" if rank else "real"))
    assert loaded(checkpoint_dir / "real", rank) == 1


def test_another_order_is_reported_to_every_rank_and_the_next_save_succeeds(
    rank: int, checkpoint_dir: Path
) -> None:
    order = ["a", "b"] if rank == 0 else ["b", "a"]
    saving = [started(numbered(n, rank), checkpoint_dir / name) for n, name in enumerate(order)]
    for future in saving:
        assert "where the coordinator runs it with" in str(failure(partial(future.result, WAIT_S)))
    dcp.save(numbered(2, rank), checkpoint_id=checkpoint_dir)
    assert loaded(checkpoint_dir, rank) == 2


@pytest.mark.parametrize("background", [False, True])
def test_after_a_mixed_operation_the_next_one_succeeds(
    rank: int, checkpoint_dir: Path, background: bool
) -> None:
    dcp.save(numbered(1, rank), checkpoint_id=checkpoint_dir)
    for loader in (0, 1):

        def mixed() -> object:
            if rank == loader:  # noqa: B023 - called at once
                return loaded(checkpoint_dir, rank)
            if background:
                return started(numbered(2, rank), checkpoint_dir).result(WAIT_S)
            return dcp.save(numbered(2, rank), checkpoint_id=checkpoint_dir)

        error = failure(mixed)
        verbs = ("load", "save") if loader == 1 else ("save", "load")
        theirs, ours = (f"runs '{verb}' of '{checkpoint_dir}'" for verb in verbs)
        assert f"rank 1 {theirs} where the coordinator {ours}" in str(error)
        assert loaded(checkpoint_dir, rank) == 1
    dcp.save(numbered(3, rank), checkpoint_id=checkpoint_dir)
    assert loaded(checkpoint_dir, rank) == 3


def test_calls_made_before_the_ranks_were_out_of_count_fail_and_the_next_succeeds(
    rank: int, world: RankWorld
) -> None:
    group = dist.new_group(timeout=timedelta(seconds=1.5))

    def team() -> Team:
        return team_of(group, OperationCall("save"), use_dist=True, coordinator_rank=0)

    def met(one: Team) -> list[int]:
        with one.wait_for_turn():
            return one.all_gather("meet", lambda: rank)

    if rank == 0:
        with pytest.raises(StepError, match="rank 1 was silent"):
            met(team())
    world.barrier()
    called = [team() for _ in range(3)]
    texts = []
    for one in called:
        with pytest.raises(OutOfStepError) as caught:
            met(one)
        texts.append(str(caught.value))
    assert len(set(world.gather(texts[0]))) == 1
    assert "rank 1 is in operation 1 of this group where the coordinator is in 2" in texts[0]
    assert texts == texts[:1] * 3
    world.barrier()
    for _ in range(3):
        assert met(team()) == [0, 1]


# Errors of one rank alone, before the first step.


class Unsendable(dcp.DefaultSavePlanner):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


WRONG_CALLS: dict[str, tuple[Callable[..., object], dict[str, Any], type[Exception]]] = {
    "a save without a folder": (dcp.save, {"checkpoint_id": None}, RuntimeError),
    "a background save without a folder": (started, {"folder": None}, RuntimeError),
    "a load without a folder": (dcp.load, {"checkpoint_id": None}, RuntimeError),
    "a load of options that do not go together": (
        dcp.load,
        {"planner": dcp.DefaultLoadPlanner(), "strict": False},
        ValueError,
    ),
    "a load that is to be verified in an unknown way": (dcp.load, {"verify": "some"}, ValueError),
    "a planner that cannot be sent to a process": (
        started,
        {"planner": Unsendable, "async_checkpointer_type": PROCESS},
        TypeError,
    ),
}


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("call", WRONG_CALLS)
def test_an_error_of_one_rank_before_it_meets_the_others_reaches_them(
    rank: int, checkpoint_dir: Path, call: str, wrong: int
) -> None:
    verb, options, expected = WRONG_CALLS[call]
    dcp.save(numbered(1, rank), checkpoint_id=checkpoint_dir)
    where = "folder" if verb is started else "checkpoint_id"
    group = dist.new_group()
    for _ in ("in a group that has not met", "in one that has"):
        arguments: dict[str, Any] = {where: checkpoint_dir, "process_group": group}
        if rank == wrong:
            arguments |= {k: v() if v is Unsendable else v for k, v in options.items()}
            with pytest.raises(expected):
                verb(numbered(2, rank), **arguments)
        else:

            def called() -> object:
                result = verb(numbered(2, rank), **arguments)  # noqa: B023 - called at once
                return result.result(WAIT_S) if isinstance(result, Future) else result

            error = failure(called)
            assert list(error.failures) == [wrong]
            assert isinstance(error, expected)
        dcp.save(numbered(3, rank), checkpoint_id=checkpoint_dir, process_group=group)
    assert loaded(checkpoint_dir, rank) == 3


def test_an_interrupt_while_the_state_is_copied_reaches_the_others(
    rank: int, checkpoint_dir: Path
) -> None:
    class Interrupted:
        def state_dict(self) -> dict[str, Any]:
            raise KeyboardInterrupt

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    dcp.save(numbered(1, rank), checkpoint_id=checkpoint_dir)
    if rank == 1:
        with pytest.raises(KeyboardInterrupt):
            started({"it": Interrupted()}, checkpoint_dir)
    else:
        error = failure(lambda: started(numbered(2, rank), checkpoint_dir).result(WAIT_S))
        assert list(error.failures) == [1]
    with without_warnings(EXISTING):
        dcp.save(numbered(3, rank), checkpoint_id=checkpoint_dir)
    assert loaded(checkpoint_dir, rank) == 3
