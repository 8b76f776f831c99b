"""Every hook of storages and planners fails in every way, on whichever rank.

Each run ends in the same way on all ranks: in an error that names the ranks and the step, or in a
whole checkpoint or the right values. A save that fails leaves the old checkpoint whole.
`test_hooks_matrix_deaths` has the ranks that die, stand still or hang, and the stagers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.faults import (
    Fault,
    LostReply,
    Raise,
    Unpicklable,
    Unrebuildable,
    WrongShape,
    WrongType,
)
from pytest_dcp.faults.injection.injection import FUTURES
from support.hook_runs import HOOK_NAMES, NEW, OLD, Bench, Case, verb_of

pytestmark = [
    pytest.mark.world_size([1, 2, 4], isolation="module", timeout=240),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

ROLES = ("writer", "save_planner", "reader", "load_planner")
RAISING: tuple[Fault, ...] = (
    Raise(ValueError), Raise(SystemExit), LostReply(ValueError), Unpicklable(), Unrebuildable(),
)  # fmt: skip
IN_FUTURE: tuple[Fault, ...] = (Raise(ValueError, when="future"), Unpicklable(when="future"))
WRONG: tuple[Fault, ...] = (WrongType(3.5), WrongShape())
CHOICES = frozenset(
    {
        "save_planner.create_local_plan",
        "load_planner.create_local_plan",
        "load_planner.finish_plan",
    }
)
"""Hooks that choose: an item that a planner leaves out is not saved or loaded, without error."""


def ranks(world: RankWorld) -> Iterator[int | None]:
    """The coordinator, another, and (None) all; of four, the coordinator is as of two."""
    if world.size != 4:
        yield 0
    if world.size > 1:
        yield world.size - 1
        yield None


def hooks_of(role: str) -> list[str]:
    return [name for name in HOOK_NAMES if name.startswith(f"{role}.")]


@pytest.mark.parametrize("role", ROLES)
def test_a_hook_that_raises_is_named_on_every_rank(
    checkpoint_dir: Path, world: RankWorld, role: str
) -> None:
    bench = Bench(checkpoint_dir, world)
    for hook in hooks_of(role):
        for fault in (*RAISING, *IN_FUTURE) if hook in FUTURES else RAISING:
            for rank in ranks(world):
                check_raised(bench.case(hook, fault, rank), hook)
    print(f"{role}: {bench.fired} of {bench.cases} cases fired")


def check_raised(case: Case, hook: str) -> None:
    if not case.fired:
        check_returned(case, hook)
        return
    # An exception such as SystemExit, which is no error of the work, is also raised in its own
    # rank.
    own = {rank for rank, one in enumerate(case.runs) if one.error == "SystemExit"}
    assert own <= set(case.fired), case
    assert ("SystemExit" in case.name) == bool(own), case
    others = [one for rank, one in enumerate(case.runs) if rank not in own]
    assert {one.error for one in others} <= {"CheckpointException"}, case
    assert len({one.text for one in others}) <= 1, case
    for one in others:
        # If several fail, a rank that receives another's failure in time stops and is not named.
        assert one.named_ranks, case
        assert set(one.named_ranks) <= set(case.fired), case
        assert one.text.startswith("step '"), case
        assert "injected" in one.text, case
    assert case.holds in ((OLD, NEW) if hook == "writer.finish" else (OLD,)), case


def check_returned(case: Case, hook: str) -> None:
    assert case.returned, case
    assert case.holds == (OLD if verb_of(hook) == "load" else NEW), case


@pytest.mark.parametrize("role", ROLES)
def test_a_hook_that_returns_something_else_is_an_error_on_every_rank_or_does_no_harm(
    checkpoint_dir: Path, world: RankWorld, role: str
) -> None:
    bench = Bench(checkpoint_dir, world)
    for hook in hooks_of(role):
        for fault in WRONG:
            for rank in ranks(world):
                check_wrong(bench.case(hook, fault, rank), hook)
    print(f"{role}: {bench.fired} of {bench.cases} cases fired")


def check_wrong(case: Case, hook: str) -> None:
    assert case.agreed, case
    if case.raised:
        assert case.runs[0].named_ranks, case
        assert case.runs[0].text.startswith("step '"), case
        assert case.holds == OLD, case
    elif hook in CHOICES:
        assert not case.runs[0].error, case
    else:
        check_returned(case, hook)
