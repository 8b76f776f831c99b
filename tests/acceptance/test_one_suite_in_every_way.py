"""One suite has the same outcomes here, by xdist, under torchrun, adopted, and simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

OUTCOMES = {
    "gathers": "passed",
    "fails": "failed",
    "raises": "failed",
    "skips": "skipped",
    "fails_as_expected": "xfailed",
}
MARKED, UNMODIFIED = "test_marked", "test_unmodified"


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_one_suite.py": "one_suite.py"})


def outcomes(result: SessionResult, test: str) -> dict[str, str]:
    """By the name of the body: the category of the call's report."""
    found: dict[str, list[str]] = {}
    for report in result.reports:
        name, _, body = report.nodeid.rpartition("::")[2].partition("[")
        if name == test and (report.when == "call" or report.category == "skipped"):
            # pytest names a parameter that is a function after its argument, or the function.
            found.setdefault(body.rstrip("]"), []).append(report.category)
    assert all(len(categories) == 1 for categories in found.values()), found
    return {body: categories[0] for body, categories in found.items()}


def test_on_this_machine(suite: Suite) -> None:
    assert outcomes(suite.run("-k", MARKED), MARKED) == OUTCOMES


def test_by_workers_of_xdist(suite: Suite) -> None:
    assert outcomes(suite.run("-k", MARKED, "-n2"), MARKED) == OUTCOMES


def test_under_torchrun(suite: Suite) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    assert outcomes(suite.run("-k", MARKED, under=launcher), MARKED) == OUTCOMES


def test_adopted(suite: Suite) -> None:
    result = suite.run("--dcp-adopt")
    assert outcomes(result, UNMODIFIED) == OUTCOMES
    assert outcomes(result, MARKED) == OUTCOMES


@pytest.mark.parametrize("backend", ["fake", "threaded"])
def test_simulated(suite: Suite, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_SUITE_BACKEND", backend)
    result = suite.run("-k", MARKED)
    assert outcomes(result, MARKED) == OUTCOMES
    assert {one["name"] for one in result.noted("backend")} == {backend}
