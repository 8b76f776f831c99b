"""Fixtures of known plugins that keep their data in the test's process.

In a rank that is lost, and not always quietly: at the end of the session syrupy deletes snapshots
that no test of its own process used. Enters: marked items. Leaves: problems, or warnings.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import pytest

from pytest_dcp._harness.rank.carried_state import LostStateWarning
from pytest_dcp._pytest_internals import fixtures_of


@dataclass(frozen=True, slots=True)
class Losing:
    """A fixture, of a plugin."""

    package: str
    """Of the function that makes the fixture."""
    plugin: str
    """As users know it."""
    verdict: Literal["refused", "warned of"]
    what: str


KNOWN = {
    "snapshot": (
        Losing(
            "syrupy",
            "syrupy",
            "refused",
            "syrupy in pytest's own process would take the snapshots of ranks for unused, and "
            "delete them with --snapshot-update",
        ),
        Losing(
            "snapshottest",
            "snapshottest",
            "refused",
            "new snapshots would not be written, and good ones count as unused",
        ),
    ),
    "benchmark": (
        Losing(
            "pytest_benchmark",
            "pytest-benchmark",
            "warned of",
            "the table of benchmarks has no results of ranks",
        ),
    ),
    "benchmark_weave": (
        Losing(
            "pytest_benchmark",
            "pytest-benchmark",
            "warned of",
            "the table of benchmarks has no results of ranks",
        ),
    ),
    "json_metadata": (
        Losing(
            "pytest_jsonreport",
            "pytest-json-report",
            "warned of",
            "the JSON report has no data of ranks",
        ),
    ),
}
CURE = (
    "compare or measure results of `worlds(n)` in an ordinary test, or carry the data by hooks: "
    "pytest_dcp_rank_state and pytest_dcp_carries"
)


def problems_of(item: pytest.Item) -> list[str]:
    """Why a marked test is refused for its fixtures."""
    return [
        f"{_describe(name, found)}: {found.what}; {CURE}"
        for name, found in _losing_fixtures(item)
        if found.verdict == "refused"
    ]


def warn_of(item: pytest.Item) -> None:
    """Warn of the fixtures of a marked test whose data will be missing in a report."""
    for name, found in _losing_fixtures(item):
        if found.verdict == "warned of":
            text = f"{item.nodeid}: {_describe(name, found)}: {found.what}; {CURE}"
            warnings.warn(LostStateWarning(text), stacklevel=2)


def _describe(name: str, found: Losing) -> str:
    return f"uses the fixture {name!r} of {found.plugin}, which keeps its data in one process"


def _losing_fixtures(item: pytest.Item) -> list[tuple[str, Losing]]:
    return [
        (name, found)
        for name in set(getattr(item, "fixturenames", ())) & KNOWN.keys()
        for found in KNOWN[name]
        if _package_of(item, name) == found.package
        and not item.ihook.pytest_dcp_carries(fixture=name)
    ]


def _package_of(item: pytest.Item, name: str) -> str:
    """The package whose function makes a fixture of the item; empty when there is none."""
    info = fixtures_of(item)
    definitions = info.name2fixturedefs.get(name) if info is not None else None
    if not definitions:
        return ""
    module: str = getattr(definitions[-1].func, "__module__", "")
    return module.partition(".")[0]
