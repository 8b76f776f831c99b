"""Where and when a fault acts: names, patterns, counts and budgets."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp.faults.injection.injection import (
    HOOKS,
    Event,
    Injection,
    Tally,
    count,
    hooks_named,
    is_path,
    matches,
    problems,
)
from pytest_dcp.faults.kinds.base import Fault, Hang, Raise, WrongType
from pytest_dcp.faults.kinds.operations import InputOutput, NoSpace, ShortRead
from pytest_dcp.faults.tap.operation import OPERATION_KINDS

WRITE = Event("write", 0, "MainThread", True, ("a/__0_0.distcp",), 100)
HOOK = Event("writer.finish", 0, "MainThread", True)


def test_a_short_name_means_the_hook_of_every_role_and_a_long_one_that_role_s() -> None:
    assert hooks_named("prepare_local_plan") == {
        "writer.prepare_local_plan",
        "reader.prepare_local_plan",
    }
    assert hooks_named("reader.reset") == {"reader.reset"}
    assert hooks_named("write") == set()


def test_close_and_the_like_are_operations_unless_a_role_is_named() -> None:
    assert Injection(Raise(), "close").kinds == ("close",)
    assert Injection(Raise(), "stager.close").hooks == {"stager.close"}


@pytest.mark.parametrize(
    ("on", "told"),
    [
        ("write_date", "did you mean 'write_data' or"),
        ("writer.finnish", "did you mean 'writer.finish'"),
        ("fsync", "did you mean 'sync'"),
        ("xyzzy", "operations are make_folder, list"),
    ],
)
def test_a_wrong_name_is_reported_with_the_nearest_ones(on: str, told: str) -> None:
    (problem,) = problems(Injection(Raise(), on))
    assert told in problem
    assert repr(on) in problem


@pytest.mark.parametrize(
    ("injection", "told"),
    [
        (Injection(ShortRead(), "rename"), "ShortRead(nbytes=None) cannot act on 'rename'"),
        (Injection(WrongType(), "write"), "hooks only"),
        (Injection(Raise(when="future"), "finish"), "when='future' is for reader.read_data"),
        (Injection(Raise(when="future"), "write"), "when='future' is for"),
        (Injection(Hang(when="future"), "write_data"), "when takes before, after"),
        (Injection(Raise(), "finish", path="*.distcp"), "meets no path"),
        (Injection(InputOutput(), "read", nth=0), "nth takes a whole number >= 1; got 0"),
        (Injection(InputOutput(), "read", rank=-1), "rank takes a whole number >= 0; got -1"),
        (Injection(NoSpace(after_bytes=-1), "write"), "after_bytes takes"),
        (Injection(NoSpace, "write"), "a fault is expected"),  # type: ignore[arg-type]  # a class
    ],
)
def test_impossible_arguments_are_reported(injection: Injection, told: str) -> None:
    assert any(told in problem for problem in problems(injection))


def test_everything_that_is_wrong_is_reported_at_once() -> None:
    assert len(problems(Injection(ShortRead(), "rename", nth=0, rank=-3))) == 3


def test_possible_injections_have_no_problems() -> None:
    for role, hooks in HOOKS.items():
        for hook in hooks:
            assert problems(Injection(Raise(), f"{role}.{hook}")) == []
            assert problems(Injection(NoSpace(), hook, path="*.distcp")) == []
    for kind in OPERATION_KINDS:
        assert problems(Injection(InputOutput(), kind)) == []


def test_rank_thread_and_path_must_all_fit() -> None:
    worker = replace(WRITE, thread="dcp_0", is_main=False, rank=2)
    fits: dict[str, Any] = {"rank": 2, "thread": "worker", "path": "*.distcp"}
    assert matches(Injection(NoSpace(), "write", **fits), worker)
    assert matches(Injection(NoSpace(), "write", thread="dcp_*"), worker)
    others: list[dict[str, Any]] = [{"rank": 1}, {"thread": "main"}, {"thread": "x*"}]
    for other in [*others, {"path": ".metadata"}]:
        assert not matches(Injection(NoSpace(), "write", **fits | other), worker)
    assert not matches(Injection(NoSpace(), "create"), worker)


def test_a_fault_of_operations_on_a_hook_acts_at_its_operations_while_it_runs() -> None:
    on_hook = Injection(NoSpace(), "write_data")
    during = replace(WRITE, hooks=frozenset({"writer.write_data"}))
    assert matches(on_hook, during)
    assert not matches(on_hook, WRITE)
    assert not matches(on_hook, replace(during, name="sync"))  # a full disk fails no sync
    assert not matches(on_hook, Event("writer.write_data", 0, "MainThread", True))


def test_a_fault_of_hooks_acts_at_the_hook_itself() -> None:
    assert matches(Injection(Raise(), "finish"), HOOK)
    assert not matches(
        Injection(Raise(), "finish"), replace(WRITE, hooks=frozenset({"writer.finish"}))
    )


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("*.distcp", "deep/er/__0_0.distcp", True),
        (".metadata", "a/.metadata", True),
        ("a/*.distcp", "a/x.distcp", True),
        ("a/*.distcp", "b/x.distcp", False),
        ("__0_*", "__1_0.distcp", False),
        ("A*", "a", False),
    ],
)
def test_a_pattern_is_of_the_name_or_with_a_slash_of_the_path(
    pattern: str, path: str, fits: bool
) -> None:
    assert is_path(pattern, path) is fits


def fired(injection: Injection, events: list[Event]) -> list[int]:
    tally = Tally()
    return [n for n, event in enumerate(events, 1) if count(injection, tally, event) is not None]


@given(st.integers(1, 8), st.integers(0, 10), st.booleans())
def test_the_nth_event_fires_and_with_sticky_all_after_it(
    nth: int, events: int, sticky: bool
) -> None:
    got = fired(Injection(InputOutput(), "write", nth=nth, sticky=sticky), [WRITE] * events)
    assert got == [n for n in range(1, events + 1) if n == nth or (sticky and n > nth)]


@given(st.integers(0, 300), st.lists(st.integers(1, 120), max_size=8), st.booleans())
def test_a_budget_lets_exactly_that_many_bytes_through_and_then_fails(
    budget: int, sizes: list[int], sticky: bool
) -> None:
    injection, tally = Injection(NoSpace(budget), "write", sticky=sticky), Tally()
    stored, failed = 0, False
    for size in sizes:
        left = size
        while left:  # as a writer does that goes on after a short write
            firing = count(injection, tally, replace(WRITE, nbytes=left))
            if firing is None:
                stored, left = stored + left, 0
            elif firing.room_bytes:
                stored, left = stored + firing.room_bytes, left - firing.room_bytes
            else:
                failed = True
                break
        if failed:
            break
    assert failed == (sum(sizes) > budget)
    assert stored == min(sum(sizes), budget)
    assert tally.matches == int(failed) if not sticky else tally.matches >= int(failed)


def test_a_firing_that_first_shortens_a_write_is_counted_once() -> None:
    injection, tally = Injection(NoSpace(150), "write"), Tally()
    assert count(injection, tally, WRITE) is None
    first, second = count(injection, tally, WRITE), count(injection, tally, WRITE)
    assert first is not None
    assert second is not None
    assert (first.counted, first.room_bytes) == (True, 50)
    assert (second.counted, second.room_bytes) == (False, 0)
    assert count(injection, tally, WRITE) is None  # room was made: it was to fire once


def test_injections_that_are_equal_have_the_same_key_in_every_process() -> None:
    one = Injection(NoSpace(4096), "write_data", rank=2, path="*.distcp")
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.key == pickle.loads(pickle.dumps(one)).key
    assert one.key != replace(one, nth=2).key


def test_the_base_of_faults_does_nothing() -> None:
    assert Fault().problems() == []
