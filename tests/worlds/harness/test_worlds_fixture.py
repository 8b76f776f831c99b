"""The `worlds` fixture: functions run in worlds that a test starts itself.

The functions are observed from outside: through results, errors and process ids.
"""

from __future__ import annotations

import contextlib
import operator
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_dcp import RankFailure, WorldError
from pytest_dcp._harness.controller import worlds_fixture as worlds_module
from pytest_dcp._harness.protocol import world_spec

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import FunctionWorld, Worlds

LIMIT_S = 2.0
MARGIN_S = 10.0
"""For taking stacks, killing and reaping on a machine that does other work too."""
FOREVER_S = 600.0


@pytest.fixture
def two(worlds: Worlds) -> Iterator[FunctionWorld]:
    with worlds(2) as world:
        yield world


def facts(failures: tuple[RankFailure, ...]) -> list[tuple[int, str, str]]:
    return [(failure.rank, failure.kind, failure.phase) for failure in failures]


# Functions, arguments and results.


def times_rank(factor: int, *, plus: int = 0) -> int:
    return factor * dist.get_rank() + plus


def test_results_come_in_rank_order(worlds: Worlds) -> None:
    with worlds(4) as four:
        assert four.run(times_rank, 10) == [0, 10, 20, 30]
        assert four.size == 4


def test_keyword_arguments_reach_the_function(two: FunctionWorld) -> None:
    assert two.run(times_rank, 10, plus=1) == [1, 11]


def test_a_function_may_have_parameters_of_any_name(two: FunctionWorld) -> None:
    def named(function: str, self: str) -> str:
        return function + self

    assert two.run(named, function="a", self="b") == ["ab", "ab"]


def test_lambdas_and_closures_run_in_ranks(two: FunctionWorld) -> None:
    base = 100

    def inner() -> int:
        return base + dist.get_rank()

    assert two.run(lambda: base) == [100, 100]
    assert two.run(inner) == [100, 101]


def test_builtins_and_methods_run_in_ranks(two: FunctionWorld) -> None:
    assert two.run(operator.mul, 3, 4) == [12, 12]
    assert two.run("a-b".split, "-") == [["a", "b"]] * 2


def test_ranks_work_on_copies(two: FunctionWorld) -> None:
    given_list: list[int] = []
    assert two.run(lambda: given_list.append(1) or len(given_list)) == [1, 1]
    assert given_list == []


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]  # as for any mutable value


def test_values_of_the_tests_own_classes_travel_both_ways(two: FunctionWorld) -> None:
    assert two.run(lambda point: Point(point.x + dist.get_rank()), Point(5)) == [Point(5), Point(6)]


def test_tensors_travel_both_ways(two: FunctionWorld) -> None:
    first, second = two.run(lambda tensor: tensor + dist.get_rank(), torch.arange(3))
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [1, 2, 3]


def test_a_large_result_travels(two: FunctionWorld) -> None:
    assert two.run(lambda: bytes(20 << 20)) == [bytes(20 << 20)] * 2


def test_the_default_process_group_is_up(two: FunctionWorld) -> None:
    def total() -> float:
        tensor = torch.ones(1) * (dist.get_rank() + 1)
        dist.all_reduce(tensor)
        return tensor.item()

    assert two.run(total) == [3, 3]


def test_all_ranks_draw_the_same_random_numbers(two: FunctionWorld) -> None:
    first, second = two.run(lambda: (random.random(), torch.rand(1).item()))
    assert first == second


# Worlds.


def test_runs_of_one_world_keep_their_processes(two: FunctionWorld) -> None:
    pids = two.run(os.getpid)
    assert len({*pids, os.getpid()}) == 3
    assert two.run(os.getpid) == pids


def test_the_process_state_of_a_run_is_kept_for_the_next(two: FunctionWorld) -> None:
    two.run(lambda: os.environ.update(LEFT_BY_A_RUN=str(dist.get_rank())))
    assert two.run(lambda: os.environ["LEFT_BY_A_RUN"]) == ["0", "1"]
    assert "LEFT_BY_A_RUN" not in os.environ


def test_every_world_has_processes_of_its_own(worlds: Worlds) -> None:
    with worlds(2) as first:
        before = first.run(os.getpid)
    with worlds(2) as second:
        assert not {*second.run(os.getpid)} & {*before}


def test_worlds_of_different_sizes_run_side_by_side(worlds: Worlds) -> None:
    with worlds(1) as one, worlds(2) as two, worlds(3) as three:
        for world, size in ((three, 3), (one, 1), (two, 2), (three, 3)):
            assert world.run(dist.get_world_size) == [size] * size
        pids = [pid for world in (one, two, three) for pid in world.run(os.getpid)]
    assert len({*pids}) == 6


def test_an_outer_world_goes_on_when_an_inner_one_is_lost(worlds: Worlds) -> None:
    with worlds(2) as outer:
        with worlds(1) as inner, pytest.raises(WorldError):
            inner.run(os._exit, 1)
        assert outer.run(dist.get_rank) == [0, 1]


def test_no_process_is_left_when_the_block_ends(worlds: Worlds) -> None:
    with worlds(2) as world:
        pids = world.run(os.getpid)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_no_process_is_left_when_the_block_raises(worlds: Worlds) -> None:
    def leave(world: FunctionWorld) -> NoReturn:
        pids.extend(world.run(os.getpid))
        raise KeyError("the test's own")

    pids: list[int] = []
    with pytest.raises(KeyError, match="the test's own"), worlds(2) as world:
        leave(world)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_world_is_of_no_use_after_its_block(worlds: Worlds) -> None:
    with worlds(1) as world:
        pass
    with pytest.raises(WorldError, match="this world has ended"):
        world.run(os.getpid)


def test_the_backend_can_be_named(worlds: Worlds) -> None:
    with worlds(1, backend="gloo", device="cpu") as world:
        assert world.run(dist.get_backend) == ["gloo"]


def test_a_mesh_can_be_given_and_made(worlds: Worlds) -> None:
    def coordinate() -> list[int]:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found = mesh.get_coordinate()
        assert found is not None
        return list(found)

    with worlds(4, mesh=(2, 2), mesh_dim_names=("dp", "tp")) as world:
        assert world.run(coordinate) == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("size", "keywords", "said"),
    [
        (0, {}, "takes a size from 1 to 1024; got 0"),
        (-1, {}, "takes a size from 1 to 1024; got -1"),
        (100_000, {}, "takes a size from 1 to 1024; got 100000"),
        (True, {}, "takes an int or a list of ints; got True"),
        ("2", {}, "got '2'"),
        (2.0, {}, "got 2.0"),
        (None, {}, "got None"),
        ([1, 2], {}, "got [1, 2]"),
        (2, {"mesh": (2, 2)}, "mesh=(2, 2) has 4 ranks, but the size is 2"),
        (
            2,
            {"backend": "mpi"},
            "backend= takes one of auto, gloo, nccl, fake, threaded; got 'mpi'",
        ),
        (2, {"timeout": -1}, "timeout= takes seconds, or 0 or None for no limit"),
        (2, {"colour": "red"}, "has no keyword 'colour'"),
    ],
    ids=str,
)
def test_wrong_sizes_and_keywords_are_refused(
    worlds: Worlds, size: Any, keywords: dict[str, Any], said: str
) -> None:
    with (
        pytest.raises(pytest.UsageError, match=re.escape(said)) as refused,
        worlds(size, **keywords),
    ):
        pass
    # pytest's report names the test already.
    assert str(refused.value).startswith("worlds(...) ")


def test_a_block_that_was_not_entered_says_how_to_start_its_world(worlds: Worlds) -> None:
    block: Any = worlds(2)
    with pytest.raises(AttributeError, match=r"with worlds\(2\) as world: world\.run$"):
        block.run(dist.get_rank)
    with pytest.raises(AttributeError, match=r"'WorldBlock' object has no attribute 'walk'$"):
        _ = block.walk


# Failures.


def raise_in(*ranks: int) -> int:
    if dist.get_rank() in ranks:
        raise ValueError("boom")
    return dist.get_rank()


@pytest.mark.parametrize(
    ("ranks", "who"), [((1,), "rank 1"), ((0, 1), "ranks 0-1")], ids=["one", "all"]
)
def test_an_exception_names_its_ranks_and_the_world_goes_on(
    two: FunctionWorld, ranks: tuple[int, ...], who: str
) -> None:
    pids = two.run(os.getpid)
    said = rf"^{who}: ValueError: boom \(raise_in in a world of 2\)"
    with pytest.raises(WorldError, match=said) as failed:
        two.run(raise_in, *ranks)
    found = sorted(facts(failed.value.failures))
    assert found == [(rank, "failed", "call") for rank in ranks]
    assert two.run(os.getpid) == pids


def test_an_exception_shows_the_functions_own_traceback(two: FunctionWorld) -> None:
    with pytest.raises(WorldError) as failed:
        two.run(raise_in, 0)
    first, *_, last = str(failed.value).partition("Traceback")[2].splitlines()
    assert (first, last) == (" (most recent call last):", "ValueError: boom")
    assert 'raise ValueError("boom")' in str(failed.value)
    assert "pytest_dcp/harness" not in str(failed.value)


def test_assertions_are_introspected_in_functions(two: FunctionWorld) -> None:
    def check() -> None:
        found = {"rank": dist.get_rank()}
        assert found == {"rank": 0}

    with pytest.raises(WorldError, match=r"rank 1: AssertionError: assert \{'rank': 1\} == "):
        two.run(check)


def test_a_lost_rank_ends_the_world(two: FunctionWorld) -> None:
    def die() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    said = r"rank 1: was killed by signal 9 \(SIGKILL\) in call, without a verdict"
    with pytest.raises(WorldError, match=said) as lost:
        two.run(die)
    assert facts(lost.value.failures)[0] == (1, "crashed", "call")
    with pytest.raises(WorldError, match="this world has ended"):
        two.run(os.getpid)


def test_a_rank_that_dies_between_two_runs_is_missed_in_the_next(two: FunctionWorld) -> None:
    doomed = two.run(os.getpid)[1]
    os.kill(doomed, signal.SIGKILL)
    wait_until_gone(doomed)
    with pytest.raises(WorldError, match=r"rank 1: was killed by signal 9|has ended"):
        two.run(os.getpid)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + MARGIN_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_death_in_one_world_is_not_missed_while_another_is_looked_at(worlds: Worlds) -> None:
    with worlds(2) as one, contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(WorldError, match="exited with code 3 in call"))
        other = stack.enter_context(worlds(2))
        running = other.start(os._exit, 3)
        one.run(time.sleep, 0.3)
        running.result()


def test_a_rank_that_waits_for_one_that_raised_is_its_echo(two: FunctionWorld) -> None:
    def raise_or_wait() -> None:
        if dist.get_rank() == 0:
            raise ValueError("the cause")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(WorldError, match="rank 0: ValueError: the cause") as failed:
        two.run(raise_or_wait)
    assert facts(failed.value.failures) == [(0, "failed", "call"), (1, "blocked", "call")]
    assert "in all_reduce, at " in str(failed.value)


def test_a_hang_ends_at_the_worlds_limit(worlds: Worlds) -> None:
    def hang() -> None:
        if dist.get_rank() == 1:
            time.sleep(FOREVER_S)

    started = time.monotonic()
    said = r"rank 1: still in call at the time limit of 2 s, at .*_fixture.py:\d+ in hang"
    with worlds(2, timeout=LIMIT_S) as world, pytest.raises(WorldError, match=said) as late:
        world.run(hang)
    assert facts(late.value.failures) == [(1, "timeout", "call")]
    assert LIMIT_S <= time.monotonic() - started < LIMIT_S + MARGIN_S


def test_the_limit_counts_anew_for_every_run(worlds: Worlds) -> None:
    with worlds(1, timeout=LIMIT_S) as world:
        for _ in range(3):
            world.run(time.sleep, LIMIT_S / 2)


def test_a_result_that_cannot_be_pickled_is_the_ranks_failure(two: FunctionWorld) -> None:
    said = "TypeError: the function's result, a lock, cannot be pickled"
    with pytest.raises(WorldError, match=said):
        two.run(lambda: threading.Lock() if dist.get_rank() == 1 else None)
    assert two.run(dist.get_rank) == [0, 1]


def test_an_argument_that_cannot_be_pickled_is_the_callers_error(two: FunctionWorld) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        two.run(len, threading.Lock())
    assert two.run(dist.get_rank) == [0, 1]


class Unpicklable(Exception):
    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} {code}")
        self.lock = threading.Lock()


def test_an_exception_that_cannot_be_pickled_travels_as_text(two: FunctionWorld) -> None:
    def fail() -> None:
        raise Unpicklable("has a lock", 7)

    with pytest.raises(WorldError, match="ranks 0-1: Unpicklable: has a lock 7"):
        two.run(fail)
    assert two.run(dist.get_rank) == [0, 1]


@pytest.mark.parametrize(
    ("leave", "text"),
    [(sys.exit, "SystemExit: 3"), (os._exit, "exited with code 3 in call, without a verdict")],
    ids=["sys.exit", "os._exit"],
)
def test_a_function_that_leaves_the_process_fails(
    worlds: Worlds, leave: Callable[[int], NoReturn], text: str
) -> None:
    with worlds(1) as world, pytest.raises(WorldError, match=f"rank 0: {text}"):
        world.run(leave, 3)


# The meaning of pytest's own exceptions.


def test_a_skip_in_every_rank_skips_the_test(two: FunctionWorld) -> None:
    with pytest.raises(pytest.skip.Exception, match="not today"):
        two.run(pytest.skip, "not today")


def test_a_skip_in_some_ranks_is_a_failure(two: FunctionWorld) -> None:
    with pytest.raises(WorldError, match=r"rank 1 skipped \(.*not me\), but rank 0 passed"):
        two.run(lambda: dist.get_rank() == 1 and pytest.skip("not me"))


def test_an_xfail_in_all_ranks_is_the_tests(two: FunctionWorld) -> None:
    with pytest.raises(pytest.xfail.Exception, match="known"):
        two.run(lambda: pytest.xfail("known"))


def test_an_xfail_in_some_ranks_only_is_a_failure(two: FunctionWorld) -> None:
    with pytest.raises(WorldError, match=r"rank 1 xfailed \(.*known\), but rank 0 passed"):
        two.run(lambda: dist.get_rank() == 1 and pytest.xfail("known"))


# Output.


def test_output_of_ranks_is_the_tests_own_with_the_ranks_named(
    two: FunctionWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak() -> None:
        print("said by all")
        print(f"said by {dist.get_rank()}", file=sys.stderr)

    two.run(speak)
    out, err = capsys.readouterr()
    assert out == "[ranks 0-1] said by all\n"
    assert sorted(err.splitlines()) == ["[rank 0] said by 0", "[rank 1] said by 1"]


def test_the_last_words_of_a_rank_are_printed(
    worlds: Worlds, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak_and_die() -> None:
        print("last words", flush=True)
        os._exit(3)

    with worlds(1) as world, pytest.raises(WorldError):
        world.run(speak_and_die)
    assert capsys.readouterr().out == "[rank 0] last words\n"


# Hypothesis.


def reduced(values: list[int]) -> list[int]:
    """The ranks' values, summed by the ranks: rank r has each value plus r."""
    tensor = torch.tensor(values, dtype=torch.int64) + dist.get_rank()
    dist.all_reduce(tensor)
    return [int(value) for value in tensor]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=5))
def test_hypothesis_draws_and_one_world_follows(two: FunctionWorld, values: list[int]) -> None:
    assert two.run(reduced, values) == [[2 * value + 1 for value in values]] * 2


def test_hypothesis_shrinks_a_failure_in_a_rank(two: FunctionWorld) -> None:
    def small_enough(value: int) -> None:
        assert dist.get_rank() == 0 or value < 17

    @settings(max_examples=100, database=None)
    @given(value=st.integers(0, 1000))
    def law(value: int) -> None:
        seen.append(value)
        two.run(small_enough, value)

    seen: list[int] = []
    with pytest.raises(WorldError, match="rank 1: AssertionError"):
        law()
    assert seen[-1] == 17


def test_hypothesis_shrinks_a_lost_rank_in_worlds_of_their_own(worlds: Worlds) -> None:
    def survive(value: int) -> None:
        if value >= 3:
            os._exit(1)

    @settings(max_examples=20, database=None)
    @given(value=st.integers(0, 10))
    def law(value: int) -> None:
        seen.append(value)
        with worlds(1) as world:
            world.run(survive, value)

    seen: list[int] = []
    with pytest.raises(WorldError, match="exited with code 1"):
        law()
    assert seen[-1] == 3


def test_a_lambda_is_shown_with_its_file_and_line(
    worlds: Worlds, request: pytest.FixtureRequest
) -> None:
    with worlds(1) as w, pytest.raises(WorldError) as caught:
        w.run(lambda: 1 / 0)
    file = re.escape(os.path.relpath(__file__, request.config.rootpath))
    assert re.search(rf'File "{file}", line \d+, in <lambda>', str(caught.value))
    assert "dynamic-code" not in str(caught.value)


def test_a_closure_that_cannot_be_pickled_is_named_and_the_world_goes_on(worlds: Worlds) -> None:
    lock = threading.Lock()
    with worlds(1) as w:
        with pytest.raises(TypeError, match=r"closure variable 'lock' is a _thread\.lock"):
            w.run(lambda: lock)
        assert w.run(lambda: 1) == [1]


TYPED = """
from typing import assert_type

from pytest_dcp._harness.controller.worlds_fixture import Worlds


def squared(number: int, by: float = 1.0) -> float:
    return number * by


def test(worlds: Worlds) -> None:
    with worlds(2, timeout=5, mesh=(2,), backend="gloo") as w:
        assert_type(w.run(squared, 2, by=3.0), list[float])
        assert_type(w.start(squared, 2).result(), list[float])
        w.run(squared, "2")
        w.run(squared, 2, bye=3.0)
    worlds(2, timout=5)
    worlds(2, timeout="5")
    worlds(2, device="gpu")
"""


def test_results_arguments_and_keywords_are_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    path = tmp_path / "typed.py"
    path.write_text(TYPED)
    files = [str(path), worlds_module.__file__, world_spec.__file__]
    # The rest of the package is as Any: enough here, and a matter of seconds.
    options = ["--follow-imports=skip", f"--cache-dir={tmp_path}", "--config-file="]
    told, _, _ = api.run([*options, *files])
    wrong = {int(match[1]) for match in re.finditer(r"typed\.py:(\d+): error", told)}
    lines = TYPED.splitlines()
    assert wrong == {
        number
        for number, line in enumerate(lines, 1)
        if any(bad in line for bad in ('"2"', "bye=", "timout=", '"5"', '"gpu"'))
    }, told
