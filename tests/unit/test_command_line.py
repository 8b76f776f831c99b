"""Options of two tables, checked as one."""

from __future__ import annotations

import re

import pytest

from pytest_dcp._harness.controller.options import read_options
from pytest_dcp.command_line import check_together
from pytest_dcp.faults.options import read_fault_options
from support.options import FakeConfig


def test_the_problems_of_all_tables_are_one_usage_error() -> None:
    config = FakeConfig({"launch": "thread", "seed": "x", "fault-budget": "daily"}, {})
    with pytest.raises(pytest.UsageError) as refused:
        check_together(
            lambda: read_options(config),  # type: ignore[arg-type]  # a fake
            lambda: read_fault_options(config),  # type: ignore[arg-type]  # a fake
        )
    names = re.findall(r"(--dcp-\S+) takes", str(refused.value))
    assert names == ["--dcp-launch", "--dcp-seed", "--dcp-fault-budget"]


def test_without_a_problem_nothing_is_raised() -> None:
    check_together(lambda: None, lambda: 0)
