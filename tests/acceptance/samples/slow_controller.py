"""Copied as conftest.py: the controller idles between two phases of some tests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

IDLE_S = 1.0
"""Long enough for a rank to end, and to be reaped, while no process waits for it."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and "between_phases" in report.nodeid:
        Path("between-phases").touch()
        time.sleep(IDLE_S)
