"""Every error text that the page on troubleshooting quotes is in the package.

A quoted text is a code span at the start of a row; `...` in it stands for values, which in the
source are the fields of an f-string. It counts as there when its parts are found in one literal of
the package, in their order.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pytest_dcp

ROOT = Path(pytest_dcp.__file__).parent
PAGE = ROOT / "guide" / "troubleshooting.md"
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
FIELD = "\0"
"""Stands for a value in a literal of the package: no part of a quoted text may lie over one."""


@pytest.mark.parametrize("text", QUOTED)
def test_a_quoted_error_text_is_in_the_package(text: str) -> None:
    parts = [part.strip() for part in text.split("...") if part.strip()]
    assert sum(map(len, parts)) >= 12, "too short to tell this error from others"
    assert any(_has_in_order(literal, parts) for literal in _literals()), text


def test_the_page_has_many_entries_and_each_has_a_cause_and_a_cure() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(QUOTED) >= 25
    assert [row for row in rows if len([c for c in row.split(" | ") if c.strip("| ")]) != 3] == []


def test_a_text_that_no_literal_has_is_found_out() -> None:
    assert not any(_has_in_order(literal, ["was quiet for", "s"]) for literal in _literals())
    assert not _has_in_order(f"expected {FIELD} GPUs", ["expected many GPUs"])
    assert not _has_in_order("second first", ["first", "second"])


def _has_in_order(literal: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        at = literal.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@cache
def _literals() -> frozenset[str]:
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                found.add("".join(_pieces(node)))
    return frozenset(found)


def _pieces(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            for value in values:
                yield from _pieces(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield from _pieces(left)
            yield from _pieces(right)
        case _:
            yield FIELD
