"""An optimizer's state dict with one key for each state and setting of a parameter. Pure (no I/O).

`state.<parameter>.<name>` and `param_groups.<parameter>.<setting>`: a parameter's keys do not
depend on the groups, so any layout of pipeline stages or groups can load them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS

STATE = "state"
GROUPS = "param_groups"
SCALARS = frozenset({bool, int, float, str, type(None)})
"""Types of ordinary settings, compared without the checks that tensors need."""


def flatten_optimizer_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The flat form of a nested state dict; a group without parameters leaves no key."""
    flat: dict[str, Any] = {}
    for name, entries in state[STATE].items():
        for entry, value in entries.items():
            flat[f"{STATE}.{name}.{entry}"] = value
    for group in state[GROUPS]:
        for name in group[PARAMS]:
            for setting, value in group.items():
                if setting != PARAMS:
                    flat[f"{GROUPS}.{name}.{setting}"] = value
    return flat


def is_flat(state: Mapping[str, Any]) -> bool:
    """Whether it has the flat form."""
    return STATE not in state and GROUPS not in state


def nest_optimizer_state(
    flat: Mapping[str, Any], groups: Sequence[Sequence[str]], names: Collection[str]
) -> dict[str, Any]:
    """The nested form, with the parameters grouped as in `groups` if their settings are equal.

    names: every parameter of the model. A key is assigned to the longest name that it begins with;
    if no name matches, the parameter's name is the key without its last part.
    """
    name_set = frozenset(names)
    states: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = key.partition(".")
        name, _, entry = rest.rpartition(".")
        if name not in name_set:
            name, entry = _split(rest, name_set)
        (states if kind == STATE else settings).setdefault(name, {})[entry] = value
    for name in states:
        settings.setdefault(name, {})
    nested_groups = [group for members in groups for group in _group_by_settings(members, settings)]
    placed = {name for group in nested_groups for name in group[PARAMS]}
    others = [{**of, PARAMS: [name]} for name, of in settings.items() if name not in placed]
    return {STATE: states, GROUPS: nested_groups + others}


def _split(rest: str, names: Collection[str]) -> tuple[str, str]:
    name, _, entry = rest.rpartition(".")
    shorter, tail = name, entry
    while shorter and shorter not in names:
        shorter, _, step = shorter.rpartition(".")
        tail = f"{step}.{tail}"
    return (shorter, tail) if shorter else (name, entry)


def _group_by_settings(
    members: Sequence[str], settings: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """The wanted group, or several if the settings of its parameters differ."""
    by_settings: list[tuple[dict[str, Any], list[str]]] = []
    for name in members:
        if name not in settings:
            continue
        mine = settings[name]
        names = next((names for others, names in by_settings if _equal(others, mine)), None)
        if names is None:
            by_settings.append((mine, [name]))
        else:
            names.append(name)
    return [{**of, PARAMS: names} for of, names in by_settings]


def _equal(one: Any, other: Any) -> bool:
    if type(one) in SCALARS and type(other) in SCALARS:
        return bool(one == other)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return bool(torch.equal(torch.as_tensor(one).cpu(), torch.as_tensor(other).cpu()))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
