"""Copied as test_lockstep_failures.py: properties that fail, each in its own way."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, example, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

settings.register_profile("here", database=None, deadline=None, max_examples=60)
settings.load_profile("here")
world_size = pytest.mark.world_size


def meet(rank: int) -> None:
    total = torch.tensor(rank)
    dist.all_reduce(total)
    assert total.item() == sum(range(dist.get_world_size()))


@world_size(2)
@given(x=st.integers())
def test_asserts(rank: int, x: int) -> None:
    meet(rank)
    assert x < 1000 or rank == 0


@world_size(3)
@given(x=st.integers(0, 200))
def test_raises_before_a_collective(rank: int, x: int) -> None:
    note(f"looks at {x}")
    if rank == 2 and x >= 17:
        raise ValueError("boom")
    meet(rank)


@world_size(2)
@given(xs=st.lists(st.integers(0, 100), max_size=5))
def test_dies(rank: int, xs: list[int]) -> None:
    if rank == 1 and len(xs) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    meet(rank)


@world_size(2, timeout=3)
@settings(max_examples=20)
@given(x=st.integers(0, 7))
def test_hangs(rank: int, x: int) -> None:
    if rank == 1 and x > 2:
        time.sleep(1000)


@world_size(2)
@given(x=st.integers(-100, 100))
def test_has_two_bugs(rank: int, x: int) -> None:
    if rank == 1 and x > 20:
        raise ValueError("high")
    if rank == 1 and x < -20:
        raise ValueError("low")


@world_size(2)
@given(data=st.data())
def test_fails_at_drawn_data(rank: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 10), label="size")
    meet(rank)
    values = data.draw(st.lists(st.integers(), min_size=size, max_size=size))
    assert len(values) < 3 or rank == 0


@world_size(2)
@given(data=st.data())
def test_draws_other_values(rank: int, data: st.DataObject) -> None:
    data.draw(st.integers(0, 10 + rank))


@world_size(2)
@given(data=st.data())
def test_draws_once_more(rank: int, data: st.DataObject) -> None:
    if rank == 1:
        data.draw(st.booleans())
    meet(rank)


@world_size(2)
@example(x=5)
@example(x=6)
@given(x=st.integers(0, 4))
def test_fails_at_an_explicit_example(rank: int, x: int) -> None:
    meet(rank)
    assert x < 5 or rank == 0


@world_size(2)
@given(x=st.integers())
def test_rejects_everything(x: int) -> None:
    assume(False)


@world_size(2)
@given(x=st.integers())
def test_takes_a_fixture_that_is_not_new(x: int, tmp_path: object) -> None:
    pass


@world_size(2)
@given(x=st.booleans())
def test_works_on_after_a_peer_rejected(rank: int, x: bool) -> None:
    assume(rank == 1)
    until = time.process_time() + 0.2  # longer than anybody is waited for who waits himself
    while time.process_time() < until:
        pass
    raise ValueError("late")


RUNS = [0]


@world_size(2)
@given(x=st.integers())
def test_is_flaky(x: int) -> None:
    RUNS[0] += 1
    assert RUNS[0] != 5


@world_size(2)
@settings(suppress_health_check=[HealthCheck.nested_given])
@given(x=st.integers())
def test_is_nested(x: int) -> None:
    @given(st.integers())
    def inner(y: int) -> None:
        pass

    inner()


class Machine(RuleBasedStateMachine):
    added = Bundle("added")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @rule(target=added, x=st.integers(0, 10))
    def add(self, x: int) -> int:
        self.total += x
        return x

    @rule(x=added)
    def take(self, x: int) -> None:
        self.total -= x

    @invariant()
    def stays_small(self) -> None:
        assert self.total < 12 or dist.get_rank() == 0


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=8)
TestMachine = world_size(2)(Machine.TestCase)


@world_size(2)
def test_runs_a_machine(rank: int) -> None:
    meet(rank)
    run_machine(Machine, settings=settings(max_examples=60, stateful_step_count=8))
