"""Names of the folders of steps. Pure (no I/O)."""

from __future__ import annotations

import re

STEP_NAME = re.compile(r"step-(\d{1,18})")
LAST_STEP = 10**18 - 1
"""Of at most 18 digits, as `STEP_NAME` reads."""


def step_name(step: int) -> str:
    """The folder's name; eight digits sort like numbers in a shell."""
    return f"step-{step:08d}"


def number_of(name: str) -> int | None:
    """The step of a folder's name; None for a stranger's, as step-7 is."""
    match = STEP_NAME.fullmatch(name)
    step = int(match[1]) if match else -1
    return step if step >= 0 and step_name(step) == name else None
