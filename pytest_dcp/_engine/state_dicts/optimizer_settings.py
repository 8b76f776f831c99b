"""The settings that a group of parameters must have.

In its `__setstate__` an optimizer fills in the settings that its older versions did not have. The
others that its constructor sets are needed: without them its own `load_state_dict` leaves a group
that cannot be stepped. Adam needs `lr` and `betas`, but not `amsgrad`.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from pytest_dcp._engine.state_dicts.optimizer_flattening import GROUPS
from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS, Group


def needed_settings(optimizer: Optimizer, own: Group, stored: Group) -> list[str]:
    """The settings of an optimizer's group that the given one lacks and that every step needs.

    Ignores settings added by other code, such as a scheduler's `initial_lr`.
    """
    defaults = getattr(optimizer, "defaults", {})
    lacking = [name for name in own if name in defaults and name not in stored and name != PARAMS]
    if not lacking:
        return []
    filled = _fill_in_defaults(optimizer, stored)
    return [name for name in lacking if name not in filled]


def _fill_in_defaults(optimizer: Optimizer, stored: Group) -> dict[str, Any]:
    """The given settings plus the defaults that the optimizer fills in; all of its own if it
    cannot.
    """
    group = {**stored, PARAMS: []}
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__, defaults=dict(optimizer.defaults))
    try:
        twin.__setstate__({"state": {}, GROUPS: [group]})
    except Exception:  # noqa: BLE001 - a class may need more than that
        # The optimizer's own load_state_dict has the last word.
        return dict(optimizer.defaults)
    return group
