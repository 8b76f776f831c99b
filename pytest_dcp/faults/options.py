"""The faults' options, and the values that a session has for them. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from pytest_dcp.command_line import Option, OptionReader
from pytest_dcp.faults.crash_models import MODELS

FAULT_BUDGETS = {"pr": "1000", "nightly": "100000"}
"""Names of budgets: about a second, and about two minutes, for a small checkpoint."""

CRASH_ID = re.compile(rf"({'|'.join(MODELS)})-[0-9a-f]{{10}}")

OPTIONS = (
    Option(
        "fault-budget",
        "pr",
        "crash states to try of one trace: pr, nightly or a number",
        takes=int,
        words=FAULT_BUDGETS,
    ),
    Option("fault-replay", "", "try only the crash state of this id"),
)


@dataclass(frozen=True, slots=True)
class FaultOptions:
    """The options of a session, checked."""

    budget: int
    """The most crash states of one trace that are tried."""
    replay: str
    """The id of the one crash state to try; empty: all."""


def read_fault_options(config: pytest.Config) -> FaultOptions:
    """The session's options. Raises `pytest.UsageError` naming every wrong one."""
    reader = OptionReader(config, OPTIONS)
    budget = reader.number("fault-budget", low=1)
    replay = reader.text("fault-replay")
    if replay and not CRASH_ID.fullmatch(replay):
        reader.refuse(
            "fault-replay",
            "the id that a failed crash state printed: a model (" + ", ".join(MODELS) + "), "
            "- and ten hexadecimal digits",
        )
    reader.raise_problems()
    return FaultOptions(int(budget or 0), replay)
