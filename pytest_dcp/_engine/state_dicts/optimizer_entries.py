"""Which entries the state of each parameter must have, and which it may have.

The optimizer decides: the state must have the entries that its first step would make with the
settings after the load. So AMSGrad's third average is required if the state dict's groups set
`amsgrad`. If the optimizer does not reveal its entries, as L-BFGS, the entries that it holds now
are required, and no entry is unexpected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.state_dicts.mismatch import Mismatch
from pytest_dcp._engine.state_dicts.optimizer_flattening import GROUPS, STATE
from pytest_dcp._engine.state_dicts.optimizer_groups import Group
from pytest_dcp._engine.state_dicts.optimizer_initial_states import initial_entries
from pytest_dcp._engine.state_dicts.optimizer_settings import needed_settings
from pytest_dcp._engine.state_dicts.optimizer_target import Target, settings_of
from pytest_dcp._engine.state_dicts.packing import Spec
from pytest_dcp._engine.state_dicts.parts import size_of

ANEW = (
    "The state dict has no state of any parameter, as before an optimizer's first step, and this "
    "optimizer has: to let it begin anew, clear it first with optimizer.state.clear().",
)


@dataclass(frozen=True, slots=True)
class Lack:
    """The parts of one state that a state dict lacks."""

    entries: tuple[str, ...]
    """The entries that are missing."""
    whole: bool
    """Whether it has nothing of the state at all."""


@dataclass(frozen=True, slots=True)
class EntryCheck:
    """How the states of one optimizer and of a state dict compare, entry by entry."""

    lacks: Mapping[Any, Lack]
    """By the name of the parameter, or the key of what the optimizer keeps for all of them."""
    strange: tuple[str, ...]
    """Keys of entries that the optimizer does not know: state.<parameter>.<entry>."""
    unset: tuple[str, ...] = ()
    """Keys of groups without any setting, and of missing settings that every step needs."""
    advice: tuple[str, ...] = ()
    """Advice, if the cure is not obvious."""

    def mismatch(self) -> Mismatch:
        """The same as keys of a flat state dict; a state that is wholly missing is one key."""
        missing: list[str] = []
        for name, lack in self.lacks.items():
            state = f"{STATE}.{name}"
            missing += [state] if lack.whole else [f"{state}.{entry}" for entry in lack.entries]
        return Mismatch((*missing, *self.unset), self.strange, advice=self.advice)


def check_entries(
    target: Target,
    partners: Sequence[Group | None],
    states: Mapping[Any, Any],
    grouped: Collection[str],
    *,
    raw: bool,
) -> EntryCheck:
    """Compare a state dict's entries for each parameter in these groups with the required ones.

    partners: for each group of the optimizer, its group in the state dict.
    states: the state of each parameter, {} without one, and the state kept for all parameters.
    grouped: the parameters that are in a group of the state dict; others are ignored.
    raw: whether it is the optimizer's own state dict, which lacks parameters that were not stepped
        yet. In such a state dict, and in one without the state of any parameter, a state is missing
        only if this optimizer has one, which would be lost.

    Collective with FSDP1, which then looks for such a state.
    """
    unstepped = not any(states[name] for name in grouped)
    if_held = raw or unstepped
    lacks: dict[Any, Lack] = {}
    strange: list[str] = []
    for at, (names, partner) in enumerate(zip(target.groups, partners, strict=True)):
        specs = {n: _spec(target, n) for n in names if n in grouped and _is_trained(target, at, n)}
        entries_of_spec = _entries_of(target, at, partner, specs.values())
        for name, spec in specs.items():
            stored_entries, new_entries = states[name], entries_of_spec.get(spec)
            if new_entries is not None and stored_entries.keys() == new_entries.keys():
                continue  # the common case, without the checks below
            current = target.current(name)
            if new_entries is None and not spec.shape.numel():
                continue
            required = [
                k
                for k, v in (current if new_entries is None else new_entries).items()
                if v is not None
            ]
            missing = tuple(entry for entry in required if entry not in stored_entries)
            if missing and (stored_entries or not if_held or target.holds(name)):
                lacks[name] = Lack(missing, whole=not stored_entries)
            if new_entries is not None:
                allowed = new_entries.keys() | current.keys()
                strange += [
                    f"{STATE}.{name}.{entry}" for entry in stored_entries if entry not in allowed
                ]
    for key in target.common_keys():
        if key not in states:
            lacks[key] = Lack((), whole=True)
    unset = _find_unset_keys(target, partners, alien=bool(strange))
    return EntryCheck(lacks, tuple(strange), unset, ANEW if unstepped and lacks else ())


def _is_trained(target: Target, at: int, name: str) -> bool:
    parameter = target.scope.parameters.get(name)
    if parameter is not None:
        return parameter.requires_grad and name not in target.scope.frozen
    # FSDP1 shows flat parameters instead of the model's own.
    return all(flat.requires_grad for flat in target.optimizer.param_groups[at]["params"])


def _entries_of(
    target: Target, at: int, partner: Group | None, specs: Iterable[Spec]
) -> dict[Spec, dict[str, Any]]:
    # No optimizer needs a state for a parameter without elements.
    different = [spec for spec in dict.fromkeys(specs) if spec.shape.numel()]
    if not different:
        return {}
    group = {**target.optimizer.param_groups[at], **settings_of(partner or {})}
    return initial_entries(target.optimizer, group, different)


def _spec(target: Target, name: str) -> Spec:
    layout = target.layouts[name]
    return Spec(size_of(layout), layout.dtype)


def _find_unset_keys(
    target: Target, partners: Sequence[Group | None], *, alien: bool
) -> tuple[str, ...]:
    """Keys of groups without any setting, and of missing settings that every step needs.

    alien: the states are from another kind of optimizer. They show this, and its settings differ.
    """
    found: list[str] = []
    own = target.optimizer.param_groups
    for names, partner, group in zip(target.groups, partners, own, strict=True):
        if not names or partner is None or not settings_of(group):
            continue
        key = f"{GROUPS}.{names[0]}"
        settings = settings_of(partner)
        if not settings:
            found.append(key)
        elif not alien:
            needed = needed_settings(target.optimizer, group, settings)
            found += [f"{key}.{setting}" for setting in needed]
    return tuple(found)
