"""`@given` in worlds: a failure is found in all ranks, minimised, and reported once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

FAILED = {"call": "failed"}
TITLE = "minimal failing example"


@dataclass(frozen=True, slots=True)
class Case:
    """A test of the sample and what its one report must say."""

    test: str
    headline: str
    """A pattern at the start of its first line."""
    example: str = ""
    """The minimal example, as its argument is shown."""
    also: tuple[str, ...] = ()


CASES = (
    Case("test_asserts", "rank 1: AssertionError: assert", "x=1000"),
    Case(
        "test_raises_before_a_collective",
        "rank 2: ValueError: boom$",
        "x=17",
        ("ranks 0-1: still in call, in all_reduce, at ", "\nlooks at 17\n"),
    ),
    Case("test_dies", r"rank 1: was killed by signal 9 \(SIGKILL\) in call", "xs=[0, 0]"),
    Case("test_hangs", "rank 1: still in call at the time limit of 3 s, at .*in test_hangs", "x=3"),
    Case(
        "test_has_two_bugs",
        "rank 1: ValueError: (low|high)$",
        "x=21",
        ("x=-21", "distinct failure 2 of 2", "ValueError: low", "ValueError: high"),
    ),
    Case(
        "test_fails_at_drawn_data",
        "rank 1: AssertionError",
        "data=data(...)",
        ("Draw 1 (size): 3\nDraw 2: [0, 0, 0]",),
    ),
    Case(
        "test_draws_other_values",
        r"ranks diverged at choice 1 .*rank 0 drew integer\(min_value=0, max_value=10.*"
        r"rank 1 drew integer\(min_value=0, max_value=11",
    ),
    Case(
        "test_draws_once_more",
        "ranks diverged at choice 1 .*rank 0 drew nothing more; rank 1 drew boolean",
    ),
    Case(
        "test_fails_at_an_explicit_example",
        "rank 1: AssertionError: assert .5 < 5",
        also=("(Failing|Falsifying) explicit example: test_fails_at_an_explicit_example", "x=5"),
    ),
    Case("test_works_on_after_a_peer_rejected", "rank 1: ValueError: late$", "x=False"),
    Case("test_rejects_everything", ".*", also=("filtered out|filtering out|Unable to satisfy",)),
    Case(
        "test_takes_a_fixture_that_is_not_new",
        "ranks 0-1: FailedHealthCheck: .*function-scoped fixtures tmp_path",
    ),
    Case("test_is_flaky", ".*", also=("Flaky",)),
    Case("test_is_nested", "ranks 0-1: DcpError: inner: a @given test was called inside"),
)
BLOB = re.compile(r"@reproduce_failure\('([^']+)', b'([^']+)'\)")


@pytest.fixture(scope="module")
def failures(make_suite: MakeSuite) -> SessionResult:
    suite = make_suite({"test_lockstep_failures.py": "lockstep_failures.py"})
    return suite.run("--dcp-grace=0.5", "test_lockstep_failures.py")


def test_every_case_is_looked_at(failures: SessionResult) -> None:
    looked_at = {case.test for case in CASES} | {"runTest", "test_runs_a_machine"}
    assert looked_at == {nodeid.rpartition("::")[2] for nodeid in failures.collected}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.test)
def test_a_failing_property_is_reported_once_and_minimal(
    failures: SessionResult, case: Case
) -> None:
    assert failures.outcomes(case.test) == FAILED
    text = failures.bad(case.test).text
    assert re.match(case.headline, failures.bad(case.test).headline)
    if case.example:
        assert f"    {case.example},\n" in text
        assert text.count(TITLE) == (2 if "two_bugs" in case.test else 1)
        assert BLOB.search(text)
        assert "--hypothesis-seed=" in text
    for said in case.also:
        assert re.search(said, text) or said in text


@pytest.mark.parametrize("test", ["runTest", "test_runs_a_machine"])
def test_a_machine_prints_its_steps_once(failures: SessionResult, test: str) -> None:
    report = failures.bad(test)
    assert report.headline.startswith("rank 1: AssertionError: assert (12 < 12")
    steps = re.findall(r"state\.add\(x=\d+\)", report.text)
    assert len(steps) == 2
    assert report.text.count("state = Machine()") == 1


def test_hypothesis_frames_are_left_out(failures: SessionResult) -> None:
    for test in ("test_asserts", "test_fails_at_an_explicit_example"):
        text = failures.bad(test).text
        assert "in execute_once" not in text
        assert "pytest_dcp/harness" not in text


def test_nothing_is_left(failures: SessionResult) -> None:
    assert failures.left_running == ()
    assert failures.left_in_tmpdir == ()
    assert failures.repeated() == []


# Sessions that follow each other.


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_lockstep_replays.py": "lockstep_replays.py"})


@pytest.fixture(scope="module")
def first(suite: Suite) -> SessionResult:
    return suite.run("--hypothesis-show-statistics")


def drawn(session: SessionResult, about: str, **where: int) -> list[int]:
    """The values a test was run with, in order, in rank 0 or the given place."""
    where = where or {"rank": 0}
    return [
        note["x"]
        for note in session.noted(about)
        if all(note[name] == value for name, value in where.items())
    ]


def test_all_ranks_run_the_same_examples(first: SessionResult) -> None:
    ranks = [drawn(first, "passes", rank=rank) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 30


def test_a_rank_that_the_last_example_lost_does_not_skip_the_test(first: SessionResult) -> None:
    assert first.outcomes("test_loses_a_rank") == {"call": "passed"}


def test_statistics_are_shown(first: SessionResult) -> None:
    assert re.search(r"test_passes:\n.*\n.*\n.*Typical runtimes", first.output)
    assert "30 passing" in first.output
    assert re.search(r"\d+\.\d+%, even", first.output)
    assert "Highest target score: 100" in first.output


def test_the_database_has_the_failure_for_the_next_session(
    suite: Suite, first: SessionResult
) -> None:
    assert first.outcomes("test_fails") == FAILED
    again = suite.run()
    assert drawn(again, "fails")[0] == 1000
    assert drawn(again, "larger", size=2)[0] == 100
    assert 100 not in drawn(again, "larger", size=1)[:1]


def test_the_blob_reproduces_the_failure(suite: Suite, first: SessionResult) -> None:
    blob = BLOB.search(first.bad("test_fails").text)
    assert blob is not None
    again = suite.run("-k", "test_fails and not larger", env={"BLOB": " ".join(blob.groups())})
    assert drawn(again, "fails") == [1000]
    assert again.bad("test_fails").headline.startswith(
        "rank 1: AssertionError: assert (1000 < 1000"
    )


def test_the_rerun_line_finds_the_failure_again(suite: Suite, first: SessionResult) -> None:
    line = re.search(r"pytest (.*test_fails) (--dcp.*)", first.bad("test_fails").text)
    assert line is not None
    again = suite.run(line[1], *line[2].split())
    assert again.outcomes("test_fails") == FAILED
    known = len(drawn(first, "fails"))
    assert drawn(again, "fails")[:known] == drawn(first, "fails")[: len(drawn(again, "fails"))]


def test_a_forced_seed_gives_the_same_examples(suite: Suite) -> None:
    runs = [suite.run("--hypothesis-seed=7", "-k", "test_passes") for _ in range(2)]
    assert drawn(runs[0], "passes") == drawn(runs[1], "passes")


def test_works_in_spawned_ranks_and_under_xdist(suite: Suite) -> None:
    for options in (("--dcp-launch=spawn",), ("-n2",)):
        session = suite.run("-k", "test_fails and not larger or test_passes", *options)
        assert session.outcomes("test_passes") == {"call": "passed"}
        assert "    x=1000,\n" in session.bad("test_fails").text
