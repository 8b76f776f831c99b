"""Warnings that ranks have recorded, and those about what a test did to a warm world."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import pytest

from pytest_dcp._harness.protocol.messages import RecordedWarning
from pytest_dcp._harness.world.outcome import Outcome
from pytest_dcp.rank_names import ranks_text


class ChangedStateWarning(pytest.PytestWarning):
    """A test of a warm world changed its process for good; the next test got a new world."""


def warn_again(outcome: Outcome) -> None:
    """Warn of what ranks have warned of, once for all ranks."""
    distinct: dict[tuple[str, ...], RecordedWarning] = {}
    for result in outcome.results.values():
        for warning in result.warnings:
            distinct.setdefault(tuple(map(str, warning.values())), warning)
    for warning in distinct.values():
        category = _warning_class(warning["category"])
        warnings.warn_explicit(warning["text"], category, warning["filename"], warning["lineno"])


def warn_of_changes(nodeid: str, outcome: Outcome) -> None:
    """Warn of process state that cannot be restored, if that costs a new world."""
    by_name: dict[str, list[int]] = {}
    for rank, result in sorted(outcome.results.items()):
        for name in result.changed:
            by_name.setdefault(name, []).append(rank)
    if by_name:
        changes = "; ".join(f"{name} ({ranks_text(ranks)})" for name, ranks in by_name.items())
        warnings.warn(
            ChangedStateWarning(
                f"{nodeid}: has changed state that cannot be restored: {changes}. The next "
                "test gets a new world. Put it back in the test, or give the test a world of "
                'its own with isolation="test".'
            ),
            stacklevel=2,
        )


def _warning_class(name: Iterable[str]) -> type[Warning]:
    module, qualname = name
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
