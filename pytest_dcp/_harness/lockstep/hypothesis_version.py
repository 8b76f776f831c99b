"""Which versions of Hypothesis can run in lockstep; imported only if Hypothesis is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import hypothesis
from hypothesis import core

from pytest_dcp.errors import UnsupportedVersionError
from pytest_dcp.supported_versions import SupportedVersions, missing_name

HYPOTHESIS = SupportedVersions("hypothesis", hypothesis.__version__, "6.136", "6.170")


def problem() -> UnsupportedVersionError | None:
    """Why properties cannot run in worlds with the installed Hypothesis; None if they can."""
    try:
        from pytest_dcp._harness.lockstep import hypothesis_internals

        lacking = hypothesis_internals.missing_internals()
    except ImportError as exc:
        lacking = missing_name(exc)
    return HYPOTHESIS.refuse(lacking) if lacking else None


def make_ready() -> bool:
    """Prepare this process for ranks with properties, or make it refuse them. Returns whether it is
    ready.
    """
    if error := problem():
        refuse(error)
        return False
    from pytest_dcp._harness.lockstep import hypothesis_internals

    hypothesis_internals.freeze_constants()
    return True


def refuse(error: UnsupportedVersionError) -> None:
    """Make every property of this process raise: ranks that draw on their own would diverge."""

    def run_engine(self: Any) -> NoReturn:
        # Hypothesis asks the runner why it stopped; without one its own assertion hides our error.
        self._runner = SimpleNamespace(statistics={})
        raise HYPOTHESIS.refuse(error.missing)

    core.StateForActualGivenExecution.run_engine = run_engine  # type: ignore[method-assign]  # no hook for it
