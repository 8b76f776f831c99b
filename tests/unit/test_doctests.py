"""The examples in docstrings: each runs as a doctest and prints what the docstring says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_dcp

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

WITH_EXAMPLES = {
    "pytest_dcp._engine.coordinate.gloo_listener",
    "pytest_dcp._engine.format.manifest",
    "pytest_dcp._engine.io.commit",
    "pytest_dcp._engine.plan.boxes",
    "pytest_dcp._engine.plan.columns",
    "pytest_dcp._engine.plan.coverage",
    "pytest_dcp._engine.plan.layout",
    "pytest_dcp._engine.plan.load",
    "pytest_dcp._engine.plan.match",
    "pytest_dcp._engine.plan.nested",
    "pytest_dcp._engine.plan.save",
    "pytest_dcp._engine.plan.shards",
    "pytest_dcp._engine.unpickle.machine",
    "pytest_dcp.faults.crashes.crash_points",
    "pytest_dcp.faults.crashes.disk_model",
    "pytest_dcp.faults.crashes.enumerate",
}
"""Modules that must have at least one: the walk would not notice that it finds none."""


def modules_with_examples() -> Iterator[str]:
    for found in pkgutil.walk_packages(pytest_dcp.__path__, "pytest_dcp."):
        spec = importlib.util.find_spec(found.name)
        # Read, not imported: collection stays quick, and most modules have no example.
        if spec is not None and spec.origin and ">>> " in Path(spec.origin).read_text("utf-8"):
            yield found.name


MODULES = sorted(modules_with_examples())


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_their_docstring_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # examples save to relative folders
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).attempted, f"{name} has '>>> ' outside of docstrings"
    assert not report, "".join(report)


def test_no_module_has_lost_its_examples() -> None:
    assert set(MODULES) >= WITH_EXAMPLES
