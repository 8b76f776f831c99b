"""Ranks that die, stop or hang at each hook: every survivor's error names the rank and the step.

Each case has a world of its own; several run at once, since most of them only wait. A killed rank
is known by its closed connection, not by a time-out: the group's is half an hour there.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_dcp import LostRank, WorldError
from pytest_dcp.faults import Exit, Fault, FaultyStorage, Hang, Injected, Kill, Raise, Stop
from support.hook_runs import OLD, Kept, RankRun, run_or_die, save_old, verb_of

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Running, Worlds

AT_ONCE = 10
SHORT_S = 1.5
"""A group's time-out, where that is what ends a wait."""
NO_LIMIT_S = 0.0
EVERYWHERE = (
    "writer.set_up_storage_writer", "writer.prepare_local_plan", "writer.write_data",
    "writer.storage_meta",
    "save_planner.set_up_planner", "save_planner.create_local_plan", "save_planner.finish_plan",
    "save_planner.resolve_data",
    "reader.read_metadata", "reader.set_up_storage_reader", "reader.prepare_local_plan",
    "reader.read_data",
    "load_planner.set_up_planner", "load_planner.create_local_plan", "load_planner.finish_plan",
    "load_planner.load_bytes", "load_planner.resolve_tensor", "load_planner.commit_tensor",
)  # fmt: skip
ON_COORDINATOR = (
    "writer.prepare_global_plan", "writer.finish", "save_planner.create_global_plan",
    "reader.prepare_global_plan", "load_planner.create_global_plan",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """One case."""

    hook: str
    rank: int


@dataclass(frozen=True, slots=True)
class Played:
    """The result of a case."""

    plan: Plan
    fired: tuple[int, ...]
    results: list[RankRun | LostRank] | str
    """One per rank, or the error of a world of which nothing is left."""
    holds: int | None

    @property
    def survivors(self) -> list[RankRun]:
        return [one for one in self.results if isinstance(one, RankRun)]

    @property
    def lost(self) -> list[int]:
        return [one.rank for one in self.results if isinstance(one, LostRank)]


def plans(size: int) -> list[Plan]:
    other = [Plan(hook, size - 1) for hook in EVERYWHERE] if size > 1 else []
    return [*(Plan(hook, 0) for hook in (*EVERYWHERE, *ON_COORDINATOR)), *other]


class Stage:
    """Plays cases, some at a time, each in a world and a folder of its own."""

    def __init__(self, worlds: Worlds, folder: Path) -> None:
        self._worlds = worlds
        self._folder = folder
        self._number = itertools.count()
        save_old(folder / "old")

    def play(
        self, size: int, fault: Fault, cases: Sequence[Plan], timeout_s: float
    ) -> Iterator[Played]:
        """Play the cases; yields the result of each. `timeout_s` is the process group's."""
        for start in range(0, len(cases), AT_ONCE):
            with ExitStack() as stack:
                some = cases[start : start + AT_ONCE]
                started = [self._start(stack, size, fault, plan, timeout_s) for plan in some]
                for plan, (injected, kept, running) in zip(some, started, strict=True):
                    results = result_of(running)
                    fired = tuple(injected.fired_by_rank)
                    yield Played(plan, fired, results, kept.look())

    def _start(
        self, stack: ExitStack, size: int, fault: Fault, plan: Plan, timeout_s: float
    ) -> tuple[Injected, Kept, Running]:
        number = next(self._number)
        folder = self._folder / f"checkpoint{number}"
        shutil.copytree(self._folder / "old", folder)
        storage = FaultyStorage(folder, self._folder / f"counts{number}")
        stack.callback(storage.close)
        injected = storage.inject(fault, on=plan.hook, rank=plan.rank, must_fire=False)
        world = stack.enter_context(self._worlds(size, timeout=60))
        running = world.start(run_or_die, storage, plan.hook, timeout_s)
        return injected, Kept(folder), running


def result_of(running: Running) -> list[RankRun | LostRank] | str:
    try:
        return running.result()
    except WorldError as error:
        return str(error)


@pytest.fixture
def stage(worlds: Worlds, tmp_path: Path) -> Stage:
    return Stage(worlds, tmp_path)


def wrong_in(played: Played, reason: str) -> str:
    """Why the survivors of a rank that ended were not told so; empty when they were."""
    rank = played.plan.rank
    if isinstance(played.results, str):
        return played.results
    if played.fired != (rank,) or played.lost != [rank]:
        return "the fault did not end the rank"
    if played.holds != OLD:
        return "the old checkpoint is not whole"
    return "".join(wrong_with(one, rank, reason) for one in played.survivors)


def wrong_with(run: RankRun, rank: int, reason: str) -> str:
    if run.error != "CheckpointException" or run.named_ranks != (rank,):
        return f"told {run.error} of ranks {run.named_ranks}: {run.text[:200]}"
    headline = run.text.partition("\n")[0]
    if not headline.startswith("step '") or f"{reason}: rank {rank} " not in headline:
        return f"told {headline}"
    return ""


@pytest.mark.parametrize(("fault", "size"), [(Kill(), 2), (Kill(), 4), (Exit(0), 2)], ids=repr)
def test_survivors_learn_at_once_of_a_rank_that_dies(stage: Stage, fault: Fault, size: int) -> None:
    cases = plans(size)
    played = list(stage.play(size, fault, cases, NO_LIMIT_S))
    assert [(one, why) for one in played if (why := wrong_in(one, "RankEndedError"))] == []
    print(f"{fault!r}: {len(played)} cases on {size} ranks")


def test_survivors_learn_of_a_rank_that_stands_still_after_the_group_s_time_out(
    stage: Stage,
) -> None:
    played = list(stage.play(2, Stop(), plans(2), SHORT_S))
    assert [(one, why) for one in played if (why := wrong_in(one, "RankSilentError"))] == []
    print(f"Stop(): {len(played)} cases on 2 ranks")


def test_a_rank_that_hangs_is_named_by_its_peers_and_learns_of_it_when_it_continues(
    stage: Stage,
) -> None:
    played = list(stage.play(2, Hang(limit_s=4.0), plans(2), SHORT_S))
    for one in played:
        rank = one.plan.rank
        assert one.fired == (rank,), one
        assert one.holds == OLD, one
        hung, peer = one.survivors[rank], one.survivors[1 - rank]
        assert wrong_with(peer, rank, "RankSilentError") == "", one
        # It may have received all it needs before its peers gave it up; a load does no harm.
        harmless = not hung.error and hung.right and verb_of(one.plan.hook) == "load"
        assert hung.error == "CheckpointException" or harmless, one
    print(f"Hang(): {len(played)} cases on 2 ranks")


@pytest.mark.parametrize("fault", [Kill(), Exit(0)], ids=repr)
def test_the_old_checkpoint_is_whole_when_the_only_rank_dies(stage: Stage, fault: Fault) -> None:
    played = list(stage.play(1, fault, plans(1), NO_LIMIT_S))
    for one in played:
        assert "no rank is left to give a verdict" in one.results, one
        assert one.fired == (0,), one
        assert one.holds == OLD, one
    print(f"{fault!r}: {len(played)} cases on 1 rank")


# Stagers, which work before the ranks of a save first meet.

STAGED = [Plan("stager.stage", rank) for rank in (0, 1)]


@pytest.mark.parametrize("fault", [Kill(), Exit(0)], ids=repr)
def test_survivors_learn_of_a_rank_that_ends_while_it_stages(stage: Stage, fault: Fault) -> None:
    """At once; of a peer that began before its coordinator after the group's timeout."""
    for one in stage.play(2, fault, STAGED, SHORT_S):
        at_once, later = (wrong_in(one, reason) for reason in ("RankEndedError", "RankSilentError"))
        assert not at_once or (one.plan.rank == 1 and not later), (one, at_once, later)


def test_survivors_learn_of_a_rank_that_stands_still_while_it_stages_after_the_time_out(
    stage: Stage,
) -> None:
    played = list(stage.play(2, Stop(), STAGED, SHORT_S))
    assert [(one, why) for one in played if (why := wrong_in(one, "RankSilentError"))] == []


def test_a_stager_that_raises_is_named_on_every_rank_with_the_cause(stage: Stage) -> None:
    for one in stage.play(2, Raise(ValueError), STAGED, SHORT_S):
        for told in one.survivors:
            assert told.error == "CheckpointException", one
            assert "injected at stager.stage" in told.text, one
