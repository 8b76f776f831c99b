"""Which ends of a test's processes fail it: exit codes that a test expects, or has looked at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from pytest_dcp._harness.adoption.choice import names
from pytest_dcp._harness.adoption.running_test import join_alone
from pytest_dcp._harness.adoption.torch_cases import excuse
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp.errors import FailureKind, RankFailure

PASSED = Done("call", "passed", 1.0)


@dataclass
class FakePopen:
    rank: int
    returncode: int
    is_judged: bool = False


@dataclass
class FakeSet:
    """A `ProcessSet` whose processes have ended."""

    outcome: Outcome
    popens: list[FakePopen] = field(default_factory=list)
    is_judged: bool = False
    size: int = 1


def died(rank: int, code: int, kind: FailureKind = "crashed") -> RankFailure:
    return RankFailure(rank, kind, "call", float(rank), f"exited with code {code}")


def world_of(codes: list[int], kind: FailureKind = "crashed") -> FakeSet:
    """The processes of one world, of which those with a code other than 0 have died."""
    results = {rank: PASSED for rank, code in enumerate(codes) if code == 0}
    failures = [died(rank, code, kind) for rank, code in enumerate(codes) if code]
    popens = [FakePopen(rank, code) for rank, code in enumerate(codes)]
    return FakeSet(combine(len(codes), results, failures), popens, size=len(codes))


def failing_ranks(outcome: Outcome) -> list[int]:
    return [failure.rank for failure in outcome.failures]


@pytest.mark.parametrize(
    ("codes", "expected", "ranks"),
    [
        ([0, 5], 0, [1]),
        ([9, 0], 9, []),
        ([9, 9], 9, []),
        ([9, 5], 9, [1]),
        ([0, 0], 9, [0]),
        ([0, 9], 9, [0]),
        ([3, 4], None, []),
        ([10, 0], None, [0]),  # an exception that the rank has caught
        ([10, 0], 10, [0]),
    ],
)
def test_exit_codes_that_a_test_expects_are_excused(
    codes: list[int], expected: int | None, ranks: list[int]
) -> None:
    processes = world_of(codes)
    excused = excuse(processes.outcome, processes, expected)  # type: ignore[arg-type]  # a fake
    assert failing_ranks(excused) == ranks
    assert excused.kind == ("failed" if ranks else "passed")


def test_a_hang_is_never_an_expected_end() -> None:
    processes = world_of([-9, 0], "timeout")
    assert excuse(processes.outcome, processes, None).kind == "failed"  # type: ignore[arg-type]  # a fake


def test_processes_that_start_one_by_one_are_numbered_in_that_order() -> None:
    sets = [world_of([0]), world_of([5]), world_of([6])]
    outcome = join_alone(sets)  # type: ignore[arg-type]  # fakes
    assert outcome is not None
    assert failing_ranks(outcome) == [1, 2]
    assert outcome.reason.startswith("rank 1: exited with code 5")


def test_a_failure_that_the_test_has_looked_at_is_its_own_business() -> None:
    sets = [world_of([5]), world_of([6])]
    sets[0].popens[0].is_judged = True
    outcome = join_alone(sets)  # type: ignore[arg-type]  # fakes
    assert outcome is not None
    assert failing_ranks(outcome) == [1]
    sets[1].popens[0].is_judged = True
    assert join_alone(sets) is None  # type: ignore[arg-type]  # fakes


def test_a_skip_of_processes_is_no_pass() -> None:
    skip = replace(PASSED, outcome="skipped", text="Skipped: not here")
    outcome = join_alone([FakeSet(combine(1, {0: skip}, []), [FakePopen(0, 86)])])  # type: ignore[list-item]  # a fake
    assert outcome is not None
    assert (outcome.kind, outcome.reason) == ("skipped", "Skipped: not here")


@pytest.mark.parametrize(
    ("pattern", "is_named"),
    [
        ("tests", True),
        ("tests/", True),
        ("tests/test_a.py", True),
        ("tests/test_a.py::TestIt", True),
        ("tests/test_a.py::TestIt::test_one", True),
        ("tests/test_a.py::TestIt::test_one[2]", True),
        ("*::TestIt::*", True),
        ("tests/test_", False),
        ("test_one", False),
        ("tests/test_a.py::TestIt::test_one[3]", False),
    ],
)
def test_a_pattern_names_tests_as_a_whole_by_their_beginning_or_with_wildcards(
    pattern: str, is_named: bool
) -> None:
    assert names(pattern, "tests/test_a.py::TestIt::test_one[2]") is is_named
