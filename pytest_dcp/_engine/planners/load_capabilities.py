"""Asks a load planner for its capabilities; `plan.capabilities` says what each of them promises.

What a planner's class can do is asked once, at the start of a load: the answers are a value, which
the later stages get (`LoadPlannerCapabilities`). What it has planned is asked once it has planned:
its numbers, its targets, the keys that it reports.

Attributes are looked up on the object, so a wrapper that forwards attributes by `__getattr__` has
the capabilities of the planner that it wraps.

    >>> class Remembers:
    ...     repeatable = True
    ...     plans_again = False
    ...     def begin_again(self):
    ...         print("again")
    >>> remembers = ask_load_planner(Remembers())
    >>> remembers.may_repeat(has_read=True), remembers.may_repeat(has_read=False)
    (True, False)
    >>> ask_load_planner(object()).may_repeat(has_read=True)
    False
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.match_keys import LoadReport


def ask_load_planner(planner: object) -> LoadPlannerCapabilities:
    """The planner's capabilities; it has none of those that it does not name."""
    return LoadPlannerCapabilities(
        plans_alone=bool(getattr(planner, "plans_alone", False)),
        prepares_values=bool(getattr(planner, "takes_values", False)),
        plans_again=bool(getattr(planner, "plans_again", False)),
        repeatable=bool(getattr(planner, "repeatable", False)),
    )


def targets_of(planner: object, items: ReadItems) -> Callable[[int], torch.Tensor] | None:
    """The function of a `GivesTargets`; None for any other planner."""
    direct: Callable[[ReadItems], Any] | None = getattr(planner, "targets", None)
    return None if direct is None else direct(items)


def numbers_of(planner: object) -> Container[str]:
    """The names that a `TakesNumbers` takes; empty for any other planner."""
    names: Container[str] = getattr(planner, "takes_numbers", ())
    return names


def wrappers_of(planner: object) -> Container[str]:
    """The names that a `HoldsWrappers` holds; empty for any other planner."""
    names: Container[str] = getattr(planner, "wrapper_targets", ())
    return names


def lookup_of(planner: object) -> Callable[[MetadataIndex], Any] | None:
    """The function of a `HoldsWrappers`, which torch's default planner has, too; None otherwise."""
    found: Callable[[MetadataIndex], Any] | None = getattr(planner, "lookup_tensor", None)
    return found


def report_of(planner: object) -> LoadReport:
    """The report of a `ReportsKeys`; an empty report for any other planner."""
    report = getattr(planner, "report", None)
    return report if isinstance(report, LoadReport) else LoadReport()


def idle_renames_of(planner: object) -> dict[str, str]:
    """The idle renames of a `ReportsKeys`; empty for any other planner."""
    return dict(getattr(planner, "idle_renames", {}))
