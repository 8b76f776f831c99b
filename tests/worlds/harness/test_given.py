"""Properties in worlds: every rank runs each example, and all draw the same.

Every rank runs every line here, so what is asserted holds in each of them.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import (
    HealthCheck,
    assume,
    event,
    example,
    given,
    note,
    register_random,
    settings,
    target,
)
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

if TYPE_CHECKING:
    from pytest_dcp._harness.rank.world_fixture import RankWorld
    from pytest_dcp.faults import FaultyStorage

pytestmark = pytest.mark.world_size(2, timeout=60)
few = settings(max_examples=20, database=None)
nested = st.recursive(
    st.none() | st.floats() | st.text() | st.binary() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@few
@given(value=nested)
def test_ranks_draw_the_same(world: RankWorld, value: object) -> None:
    assert len(set(world.gather(repr(value)))) == 1


@few
@given(data=st.data(), size=st.integers(0, 5))
def test_ranks_draw_the_same_inside_the_test(
    world: RankWorld, data: st.DataObject, size: int
) -> None:
    drawn = [data.draw(st.text() | st.floats()) for _ in range(size)]
    world.barrier()
    drawn.append(data.draw(st.sampled_from("abc"), label="after a meeting"))
    assert len(set(world.gather(repr(drawn)))) == 1


@pytest.mark.world_size(4, timeout=60)
@few
@given(
    mesh=st.sampled_from([(4,), (2, 2), (1, 4)]).map(lambda shape: init_device_mesh("cpu", shape))
)
def test_strategies_may_use_the_process_group(mesh: DeviceMesh, rank: int) -> None:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    assert mesh.mesh[tuple(coordinate)].item() == rank


@few
@given(random_=st.randoms(), shared=st.shared(st.integers(), key="x"))
def test_random_and_shared_strategies_are_the_same(
    world: RankWorld, random_: random.Random, shared: int
) -> None:
    assert len(set(world.gather((random_.random(), shared)))) == 1


def numbers() -> tuple[float, ...]:
    """A number of each source of randomness."""
    return random.random(), float(np.random.rand()), torch.rand(1).item()


SEEN: list[tuple[float, ...]] = []


@few
@given(st.integers())
def test_each_example_is_seeded_alike(world: RankWorld, x: int) -> None:
    SEEN.append(numbers())
    assert len(set(SEEN)) == 1
    assert len(set(world.gather(SEEN[-1]))) == 1


def test_a_property_leaves_the_generators_as_they_were() -> None:
    @few
    @given(st.integers())
    def a_property(x: int) -> None:
        numbers()

    mine = random.Random(5)

    @few
    @given(st.integers())
    def another(x: int) -> None:
        register_random(mine)
        mine.random()

    another()
    twin = random.Random(5)
    twin.random()
    assert mine.random() == twin.random()  # as the example that registered it left it
    random.seed(5)
    np.random.seed(5)
    would_come = random.Random(5).random(), float(np.random.RandomState(5).rand())
    a_property()
    assert numbers()[:2] == would_come


@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers())
def test_the_environment_may_be_a_mapping_of_the_tests_own(
    monkeypatch: pytest.MonkeyPatch, x: int
) -> None:
    assert "OF_ITS_OWN" not in os.environ
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ["OF_ITS_OWN"] = "1"


@few
@given(st.booleans())
def test_an_example_leaves_the_process_as_it_was(x: bool) -> None:
    assert "LEFT_BY_AN_EXAMPLE" not in os.environ
    assert torch.get_default_dtype() is torch.float32
    os.environ["LEFT_BY_AN_EXAMPLE"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)


# Fixtures.

MADE: list[int] = []


@pytest.fixture
def made() -> int:
    MADE.append(1)
    return len(MADE)


@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers())
def test_fixtures_are_set_up_once(made: int, x: int) -> None:
    assert made == 1


@few
@example(x=1)
@example(x=2)
@given(x=st.integers())
def test_the_checkpoint_folder_is_new(
    checkpoint_dir: Path, rank: int, world: RankWorld, x: int
) -> None:
    assert list(checkpoint_dir.iterdir()) == []
    world.barrier()
    (checkpoint_dir / f"folder{rank}").mkdir()
    (checkpoint_dir / f"folder{rank}" / "file").write_text(str(x))


@few
@given(fires=st.booleans())
def test_the_faulty_storage_is_new(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, world: RankWorld, fires: bool
) -> None:
    from pytest_dcp.faults import NoSpace

    injected = faulty_storage.inject(NoSpace(), on="write", rank=0, must_fire=fires)
    assert injected.fired == 0
    world.barrier()
    if fires:
        if world.rank == 0:
            with (
                pytest.raises(OSError, match="space"),
                (checkpoint_dir / "file").open("wb") as file,
            ):
                file.write(b"x" * 100_000)
        world.barrier()
        assert injected.fired == 1


class TestMethods:
    examples: ClassVar[list[int]] = []

    def setup_example(self) -> None:
        self.examples.append(0)

    def teardown_example(self, _: object) -> None:
        self.examples.append(1)

    @few
    @given(st.integers())
    def test_executors_run_in_ranks(self, rank: int, x: int) -> None:
        assert self.examples[-1] == 0
        assert len(self.examples) % 2 == 1


@pytest.mark.parametrize("scale", [1, 10])
@few
@given(x=st.integers(0, 5))
def test_parameters_and_examples_go_together(scale: int, world_size: int, x: int) -> None:
    assert 0 <= x * scale <= 50
    assert dist.get_world_size() == world_size


# Calls of Hypothesis's functions in a test.


@few
@given(x=st.integers(0, 1000))
def test_every_rank_may_say_something(rank: int, x: int) -> None:
    event(f"rank {rank} saw an example")
    target(float(x + rank))
    note(f"rank {rank}")


@settings(few, suppress_health_check=[HealthCheck.filter_too_much])
@given(x=st.integers(0, 9))
def test_all_ranks_reject(world: RankWorld, x: int) -> None:
    assume(x % 2)
    world.barrier()


@settings(max_examples=4, database=None)
@given(x=st.integers(0, 9))
def test_one_rank_rejects_while_the_other_waits(rank: int, x: int) -> None:
    if rank == 1:
        assume(x % 3 == 0)
    dist.all_reduce(torch.ones(1))
    assert x % 3 == 0


# Examples that cost a rank, or the process group.


@settings(max_examples=4, database=None)
@given(x=st.integers(0, 9))
def test_an_example_may_lose_a_rank_as_it_asked(world: RankWorld, x: int) -> None:
    assert world.survivors == (0, 1)
    world.barrier()
    world.kill(1)
    assert world.survivors == (0,)


@settings(max_examples=4, database=None)
@given(x=st.integers(0, 9))
def test_an_example_may_destroy_the_process_group(x: int) -> None:
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


# Properties inside a test.


def test_a_test_may_run_properties(world: RankWorld) -> None:
    drawn: list[int] = []

    @few
    @given(st.integers())
    def first(x: int) -> None:
        drawn.append(x)
        dist.all_reduce(torch.ones(1))

    @few
    @given(st.integers())
    def second(x: int) -> None:
        drawn.append(-x)

    first()
    second()
    assert len(drawn) == 40
    assert world.gather(drawn) == [drawn, drawn]


class Counting(RuleBasedStateMachine):
    """Adds in all ranks, and in a plain int."""

    numbers = Bundle("numbers")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.summed = torch.zeros(1, dtype=torch.int64)

    @rule(target=numbers, x=st.integers(-5, 5))
    def add(self, x: int) -> int:
        term = torch.tensor([x * (dist.get_rank() + 1)])
        dist.all_reduce(term)
        self.summed += term
        self.total += 3 * x
        return x

    @rule(x=numbers)
    def check(self, x: int) -> None:
        assert self.summed.item() == self.total


TestCounting = pytest.mark.world_size(2)(Counting.TestCase)
TestCounting.settings = settings(max_examples=10, stateful_step_count=10, database=None)


def test_a_machine_runs_as_a_test(rank: int) -> None:
    run_machine(Counting, settings=settings(max_examples=10, stateful_step_count=10, database=None))


# Warm worlds.

PROCESSES: set[int] = set()


@pytest.mark.world_size(2, isolation="module")
@pytest.mark.parametrize("number", range(3))
@few
@given(x=st.integers())
def test_a_warm_world_runs_one_property_after_the_other(number: int, x: int) -> None:
    PROCESSES.add(os.getpid())
    assert len(PROCESSES) == 1
