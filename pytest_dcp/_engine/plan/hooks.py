"""Which hooks of a planner a subclass overrides, and checks of the hooks' results. Pure (no
I/O)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem

from pytest_dcp.errors import PlanError

Plan = TypeVar("Plan", SavePlan, LoadPlan)


def overridden(planner: object, base: type, hooks: Iterable[str]) -> bool:
    """Whether the planner's class, or the object itself, overrides any of the base's hooks."""
    return any(is_overridden(planner, base, hook) for hook in hooks)


def is_overridden(owner: object, base: type, hook: str) -> bool:
    """Whether the owner's class, or the object itself, overrides the base's hook."""
    return getattr(type(owner), hook) is not getattr(base, hook) or hook in vars(owner)


def lists_wanted(planner: object, base: type) -> bool:
    """Whether a subclass reads plans, and may expect lists that it can change."""
    hooks = ("create_local_plan", "create_global_plan", "finish_plan")
    return overridden(planner, base, hooks) or any(
        hasattr(base, hook) and is_overridden(planner, base, hook) for hook in _INNER_HOOKS
    )


_INNER_HOOKS = ("_create_global_plan", "_dedup_save_plans")


def with_list(plan: Plan, hook: Callable[..., Any]) -> Plan:
    """The plan as a hook gets it: with a list of items if the hook is another package's storage's.

    Such a storage may sort the items, or remove some, as it can with torch's.
    """
    ours = str(getattr(hook, "__module__", "")).startswith("pytest_dcp.")
    if ours or type(plan.items) is list:
        return plan
    items: Any = list(plan.items)
    return replace(plan, items=items)


def require_plan(plan: Any, kind: type[Plan], hook: str) -> Plan:
    """The plan that a hook returned. Raises TypeError, naming the hook, for anything else."""
    if not isinstance(plan, kind):
        raise TypeError(f"{hook} must return a {kind.__name__}, it returned {plan!r:.200}")
    return plan


def require_complete(planned: Plan, answer: Any, kind: type[Plan], hook: str) -> Plan:
    """The plan that a storage's hook made from the planner's.

    Raises PlanError, naming the missing items: a storage decides how items are moved, and may
    divide them; the planner decides which items there are.
    """
    plan = require_plan(answer, kind, hook)
    if plan.items is planned.items:
        return plan
    lost = _elements(planned.items) - _elements(plan.items)
    if lost:
        names = ", ".join(map(repr, sorted(lost)[:5]))
        raise PlanError(f"{hook} left out a part of {len(lost)} planned key(s): {names}")
    return plan


def _elements(items: Sequence[WriteItem | ReadItem]) -> Counter[str]:
    """How many elements the items of each key have; a value counts as one."""
    found: Counter[str] = Counter()
    for item in items:
        if isinstance(item, ReadItem):
            found[item.dest_index.fqn] += math.prod(item.lengths)
        elif item.tensor_data is None:
            found[item.index.fqn] += 1
        else:
            found[item.index.fqn] += math.prod(item.tensor_data.chunk.sizes)
    return found
