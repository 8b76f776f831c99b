"""Matches an optimizer's groups of parameters with the groups of a state dict. Pure (no I/O).

Groups have no names: groups with the same parameters match, at any position in the list.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.state_dicts.mismatch import Mismatch

PARAMS = "params"
SHOWN = 5
"""Number of a group's parameters that a message names."""

Group = Mapping[str, Any]
"""Settings, and under `params` the names of the parameters."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The groups found for all optimizers."""

    partners: tuple[Group | None, ...]
    """For each own group, the group of the state dict; None: it keeps its own settings."""
    mismatch: Mismatch


def pair_groups(
    own: Sequence[Sequence[str]], stored: Sequence[Group], ignored: Collection[str] = ()
) -> Pairing:
    """The partner of each own group, given as the names of its parameters.

    ignored: names to ignore on either side. Empty groups are paired in their order.
    """
    ours = [[name for name in names if name not in ignored] for names in own]
    theirs = [[name for name in group[PARAMS] if name not in ignored] for group in stored]
    home = {name: at for at, names in enumerate(theirs) for name in names}
    own_names = {name for names in ours for name in names}
    empty = iter([group for group, names in zip(stored, theirs, strict=True) if not names])
    partners: list[Group | None] = []
    problems: list[str] = []
    for at, names in enumerate(ours):
        if not names:
            partners.append(next(empty, None))
            continue
        homes = sorted({home[name] for name in names if name in home})
        mine = set(names)
        rest = [n for h in homes for n in theirs[h] if n in own_names and n not in mine]
        fits = len(homes) == 1 and not rest
        partners.append(stored[homes[0]] if fits else None)
        if homes and not fits:
            problems.append(_problem(at, names, homes, theirs, rest))
    missing = tuple(name for names in ours for name in names if name not in home)
    unexpected = tuple(name for name in home if name not in own_names)
    return Pairing(tuple(partners), Mismatch(missing, unexpected, groups=tuple(problems)))


def _problem(
    at: int,
    names: Sequence[str],
    homes: Sequence[int],
    theirs: Sequence[Sequence[str]],
    rest: Sequence[str],
) -> str:
    found = " and ".join(f"group {h} {_some(theirs[h])}" for h in homes)
    also = f", which also has {_some(rest)}" if rest else ""
    return (
        f"parameter group {at} of the optimizer {_some(names)} is {found} of the state dict{also}: "
        "make the optimizer with the groups that were saved"
    )


def _some(names: Sequence[str]) -> str:
    more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"({', '.join(map(repr, names[:SHOWN]))}{more})"
