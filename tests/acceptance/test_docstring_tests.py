"""Tests that docstrings show: each is a file of its own, and all run in one session.

A docstring shows a test as an indented block, or as a fenced one of Python, with a `def test_` in
it. Imports that a reader can guess are added to each.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_dcp

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

ROOT = Path(pytest_dcp.__file__).parent
GUESSED = """
import os
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp import *
from pytest_dcp.faults import *
from pytest_dcp.properties import *
"""
PORTED = """
from torch.testing._internal.common_utils import TestCase
from torch.testing._internal.distributed._tensor.common_dtensor import with_comms
"""
"""Also in classes that were ported from torch's tests; it takes a while."""
FIXTURES = {"rank", "device_mesh", "world", "checkpoint_dir", "worlds", "faulty_storage"}
"""Those whose docstrings must have one: the walk would not notice that it finds none."""


def docstrings() -> Iterator[tuple[str, str]]:
    """A name for each module, class and function, and its docstring without its indentation."""
    for path in sorted(ROOT.rglob("*.py")):
        if "demo" in path.parts:
            continue
        place = "_".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node, clean=False)
            indent = "" if isinstance(node, ast.Module) else " " * (node.col_offset + 4)
            if text:
                yield (
                    f"{place}_{getattr(node, 'name', 'module')}",
                    text.replace(f"\n{indent}", "\n"),
                )


def shown_tests(text: str) -> Iterator[str]:
    """The blocks of a docstring that define tests."""
    fences = re.compile(r"```python\n(.*?)```", re.DOTALL)
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", fences.sub("", text) + "\n", re.MULTILINE)
    for block in (*fences.findall(text), *indented):
        if re.search(r"^ *def test_", block, re.MULTILINE):
            yield textwrap.dedent(block)


SHOWN = {
    f"{name}_{number}": block
    for name, text in docstrings()
    for number, block in enumerate(shown_tests(text))
}


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    files = {
        f"test_{name}.py": GUESSED + PORTED * ("with_comms" in block) + block
        for name, block in SHOWN.items()
    }
    return make_suite(files).run("-p", "pytest_dcp", "-rA")


@pytest.mark.parametrize("name", SHOWN)
def test_the_test_that_a_docstring_shows_passes(name: str, session: SessionResult) -> None:
    own = [report for report in session.reports if report.nodeid.startswith(f"test_{name}.py")]
    bad = [report for report in own if report.category not in ("", "passed")]
    assert not bad, bad[0].text
    assert any(report.category == "passed" for report in own), session.output[-5000:]


def test_each_fixture_shows_a_test() -> None:
    lacking = {name for name in FIXTURES if not any(f"fixtures_{name}_" in key for key in SHOWN)}
    assert not lacking
