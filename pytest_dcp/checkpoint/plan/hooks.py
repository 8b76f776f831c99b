"""Which hooks of a planner a subclass has changed. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Iterable


def overridden(planner: object, base: type, hooks: Iterable[str]) -> bool:
    """Whether the planner's class, or the object itself, has another of the base's hooks."""
    return any(
        getattr(type(planner), hook) is not getattr(base, hook) or hook in vars(planner)
        for hook in hooks
    )


def lists_wanted(planner: object, base: type) -> bool:
    """Whether a subclass looks into plans, and may expect lists that it can change."""
    return overridden(planner, base, ("create_local_plan", "create_global_plan", "finish_plan"))
