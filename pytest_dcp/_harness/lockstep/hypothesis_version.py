"""Which versions of Hypothesis can run in lockstep; imported only if Hypothesis is."""

from __future__ import annotations

from typing import NoReturn

import hypothesis
from hypothesis import core

from pytest_dcp.errors import DcpError

LEAST = "6.168"


def problem() -> str:
    """Why properties cannot run in worlds with the installed Hypothesis; empty if they can."""
    try:
        from pytest_dcp._harness.lockstep import hypothesis_internals

        lacking = hypothesis_internals.missing_internals()
    except ImportError as exc:
        lacking = str(exc)
    if not lacking:
        return ""
    return (
        f"@given in a world needs Hypothesis {LEAST} or a version built like it; "
        f"{hypothesis.__version__} is not: {lacking}"
    )


def make_ready() -> bool:
    """Prepare this process for ranks with properties, or make it refuse them. Returns whether it is
    ready.
    """
    if text := problem():
        refuse(text)
        return False
    from pytest_dcp._harness.lockstep import hypothesis_internals

    hypothesis_internals.freeze_constants()
    return True


def refuse(text: str) -> None:
    """Make every property of this process raise: ranks that draw on their own would diverge."""

    def run_engine(self: object) -> NoReturn:
        raise DcpError(text)

    core.StateForActualGivenExecution.run_engine = run_engine  # type: ignore[method-assign]  # no hook for it
