"""The examples in docstrings: each runs as a doctest and prints what the docstring says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

import pytest_dcp

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

WITH_EXAMPLES = {
    "pytest_dcp._engine.background.async_save",
    "pytest_dcp._engine.coordinate.gloo_listener",
    "pytest_dcp._engine.coordinate.liveness",
    "pytest_dcp._engine.format.catalog",
    "pytest_dcp._engine.format.manifest_columns",
    "pytest_dcp._engine.io.commit",
    "pytest_dcp._engine.io.copy_plan",
    "pytest_dcp._engine.io.digests",
    "pytest_dcp._engine.io.entry_places",
    "pytest_dcp._engine.io.folder",
    "pytest_dcp._engine.plan.boxes",
    "pytest_dcp._engine.plan.column_table",
    "pytest_dcp._engine.plan.columns",
    "pytest_dcp._engine.plan.box_coverage",
    "pytest_dcp._engine.plan.index",
    "pytest_dcp._engine.plan.placement_boxes",
    "pytest_dcp._engine.plan.load",
    "pytest_dcp._engine.plan.match_keys",
    "pytest_dcp._engine.plan.nested",
    "pytest_dcp._engine.plan.per_rank",
    "pytest_dcp._engine.plan.replica_comparison",
    "pytest_dcp._engine.plan.save",
    "pytest_dcp._engine.plan.select",
    "pytest_dcp._engine.plan.shards",
    "pytest_dcp._engine.rank_files.builder",
    "pytest_dcp._engine.unpickle.machine",
    "pytest_dcp._engine.verbs.load",
    "pytest_dcp._engine.verbs.save",
    "pytest_dcp.checkpoint",
    "pytest_dcp.checkpoint.state_dict",
    "pytest_dcp.errors",
    "pytest_dcp.faults.crashes.crash_id",
    "pytest_dcp.faults.crashes.crash_points",
    "pytest_dcp.faults.crashes.crash_state",
    "pytest_dcp.faults.crashes.disk_model",
    "pytest_dcp.faults.crashes.enumerate",
    "pytest_dcp.faults.damage",
    "pytest_dcp.faults.injection.injection",
    "pytest_dcp.faults.kinds.at_rest",
    "pytest_dcp.faults.kinds.base",
    "pytest_dcp.faults.kinds.operations",
    "pytest_dcp.properties.differences",
    "pytest_dcp.properties.dtypes",
    "pytest_dcp.properties.laws.round_trips",
    "pytest_dcp.properties.placements",
    "pytest_dcp.properties.meshes",
    "pytest_dcp.properties.modules",
    "pytest_dcp.properties.optimizers",
    "pytest_dcp.properties.state_dicts",
    "pytest_dcp.properties.tensors",
}
"""Modules that must have at least one: the walk would not notice that it finds none."""


def modules_with_examples() -> Iterator[str]:
    for found in pkgutil.walk_packages(pytest_dcp.__path__, "pytest_dcp."):
        spec = importlib.util.find_spec(found.name)
        # Read, not imported: collection stays quick, and most modules have no example.
        if spec is not None and spec.origin and ">>> " in Path(spec.origin).read_text("utf-8"):
            yield found.name


MODULES = sorted(modules_with_examples())


@pytest.fixture
def a_few_examples() -> Iterator[None]:
    """Properties in docstrings try ten examples, always the same, however busy the machine is."""
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.register_profile(
        "doctests",
        max_examples=10,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("doctests")
    yield
    hypothesis.settings.load_profile(before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # examples of one process
@pytest.mark.usefixtures("a_few_examples")
@pytest.mark.parametrize("name", MODULES)
def test_examples_print_the_output_in_their_docstring(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # examples save to relative folders
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    written = re.findall(r"^ *>>> ", Path(module.__file__ or "").read_text("utf-8"), re.MULTILINE)
    ran = runner.summarize(verbose=False).attempted
    assert not report, "".join(report)
    assert ran == len(written), f"{name} has {len(written)} examples, of which {ran} were found"


def test_no_module_has_lost_its_examples() -> None:
    assert set(MODULES) >= WITH_EXAMPLES
