"""Loads a state dict with the names of the model's parameters into the optimizers.

Groups are matched by their parameters, and states by the names of their parameters; a tied
parameter has several names. Each optimizer's own `load_state_dict` has the last word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from pytest_dcp._engine.state_dicts import fsdp1
from pytest_dcp._engine.state_dicts.agreement import raise_on_all_ranks
from pytest_dcp._engine.state_dicts.broadcast import broadcast_values, from_rank0, join_mismatches
from pytest_dcp._engine.state_dicts.mismatch import Mismatch
from pytest_dcp._engine.state_dicts.optimizer_entries import Lack, check_entries
from pytest_dcp._engine.state_dicts.optimizer_flattening import (
    GROUPS,
    STATE,
    is_flat,
    nest_optimizer_state,
)
from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS, Group, pair_groups
from pytest_dcp._engine.state_dicts.optimizer_positions import is_positional, name_positions
from pytest_dcp._engine.state_dicts.optimizer_target import Target
from pytest_dcp._engine.state_dicts.scope import Scope, own_method

RAW = "raw"
"""Key beside the states and groups that rank 0 announces: whether they were an optimizer's own."""
ALL = ("all",)
"""The entry name for a value that an optimizer keeps for all parameters, which has no entries."""


@dataclass(frozen=True, slots=True)
class OptimizerLoad:
    """A state dict that fits the optimizers; nothing has changed yet."""

    scope: Scope
    targets: Sequence[Target]
    state: Mapping[str, Any]
    """Nested, each parameter under the name that its optimizer uses. With `specs`: rank 0's."""
    specs: Mapping[Any, Any] | None
    """With `broadcast_from_rank0`: tensors that rank 0 will send, by parameter and entry."""
    partners: Sequence[Group | None]
    """For each group of each optimizer in turn, the group of the state dict."""
    lacks: Mapping[Any, Lack]
    """States that remain unchanged, because the state dict lacks them."""

    @torch.no_grad()
    def run(self) -> None:
        """Load it. Collective if the check was."""
        with fsdp1.states(self.scope):
            states = self._lay_out_states() if self.specs is None else self._receive(self.specs)
            states = {name: of for name, of in states.items() if not self._keeps_own(name)}
            lacking = {name: lack.entries for name, lack in self.lacks.items()}
            partners = iter(self.partners)
            for target in self.targets:
                target.load(states, [next(partners) for _ in target.groups], lacking)

    def _keeps_own(self, name: str) -> bool:
        return name in self.lacks and self.lacks[name].whole

    def _lay_out_states(self) -> dict[str, Any]:
        states = dict(self.state[STATE])
        seen: set[int] = set()
        for target in self.targets:
            for name in target.names() & states.keys():
                mine = {e: target.lay_out(name, e, value) for e, value in states[name].items()}
                states[name] = {e: _copy_if_shared(value, seen) for e, value in mine.items()}
        return states

    def _receive(self, specs: Mapping[Any, Any]) -> dict[str, Any]:
        """Rank 0's states, each tensor in the optimizer's own memory."""
        states = _join_entries(self.state[STATE], specs)
        owner = {name: target for target in self.targets for name in target.names()}
        values = _split_into_entries(self.state[STATE]) if dist.get_rank() == 0 else {}

        def take(key: tuple[Any, Any], full: torch.Tensor) -> None:
            name, entry = key
            if name in owner:
                states[name][entry] = owner[name].fill(name, entry, full)

        from_rank0(values, specs, self.scope.parameters.values(), take)
        return states


@torch.no_grad()
def check_optimizers(
    scope: Scope, optimizers: Sequence[Optimizer], state_dict: Mapping[str, Any]
) -> OptimizerLoad | None:
    """Check that a state dict fits optimizers that together have its parameters; changes nothing.

    None if there is nothing to load: an empty state dict, if it is allowed, leaves the optimizers
    alone. The state dict is nested or flat, or one optimizer's own. Tensors may be whole or sharded
    in any way. Collective with FSDP1 and with `broadcast_from_rank0`. Raises
    CheckpointMismatchError, naming everything at once, for parameters, groups, entries of states
    and sizes that do not fit.
    """
    if not optimizers:
        return None
    with fsdp1.states(scope):
        from_rank0_only = scope.options.broadcast_from_rank0
        with (
            raise_on_all_ranks("while the optimizers were named")
            if from_rank0_only
            else nullcontext()
        ):
            targets = _targets(scope, optimizers)
            raw = is_positional(state_dict)
            state = _align_names(
                scope, name_positions(targets, state_dict) if raw else state_dict, targets
            )
        if scope.options.broadcast_from_rank0:
            return _check_from_rank0(scope, optimizers, targets, state, raw)
        if not state_dict and scope.takes_nothing():
            return None
        mismatch, partners, lacks = _compare(scope, targets, state, raw)
        mismatch.require_none(_kinds(optimizers), strict=scope.options.strict)
        return OptimizerLoad(scope, targets, state, None, partners, lacks)


def _check_from_rank0(
    scope: Scope, optimizers: Sequence[Optimizer], targets: Sequence[Target], state: Any, raw: bool
) -> OptimizerLoad | None:
    """The same for rank 0's state; the others learn its keys and sizes."""

    def made() -> dict[Any, Any]:
        empty = [name for name, of in state[STATE].items() if _is_state(of) and not of]
        return {**_split_into_entries(state[STATE]), GROUPS: state[GROUPS], STATE: empty, RAW: raw}

    specs = broadcast_values(made)
    groups, bare, raw = specs.pop(GROUPS), specs.pop(STATE), specs.pop(RAW)
    if not groups and not bare and not specs and scope.takes_nothing():
        return None
    states = {name: {} for name in bare} | _join_entries({}, specs)
    with raise_on_all_ranks("while rank 0's state was compared with the optimizers"):
        compared = _compare(scope, targets, {STATE: states, GROUPS: groups}, raw)
    mismatch, partners, lacks = compared
    join_mismatches(mismatch).require_none(_kinds(optimizers), strict=scope.options.strict)
    if dist.get_rank() != 0:
        state = {STATE: {name: {} for name in bare}, GROUPS: groups}
    return OptimizerLoad(scope, targets, state, specs, partners, lacks)


def _kinds(optimizers: Sequence[Optimizer]) -> str:
    return ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers))


def _split_into_entries(states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, of in states.items():
        found |= (
            {(name, entry): v for entry, v in of.items()} if _is_state(of) else {(name, ALL): of}
        )
    return found


def _is_state(of: Any) -> bool:
    return isinstance(of, Mapping)


def _join_entries(states: Mapping[Any, Any], entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """The states without entries, and the states made of the entries."""
    found: dict[Any, Any] = {name: {} for name in states}
    for (name, entry), value in entries.items():
        if entry == ALL:
            found[name] = value
        else:
            found.setdefault(name, {})[entry] = value
    return found


def _targets(scope: Scope, optimizers: Sequence[Optimizer]) -> list[Target]:
    if not scope.in_fsdp1:
        return [Target.of(scope, optimizer) for optimizer in optimizers]
    state = own_method(scope.model, "state_dict")()
    layouts = {scope.names.canonical(key): value for key, value in state.items()}
    return [Target.of_fsdp1(scope, optimizer, layouts) for optimizer in optimizers]


def _align_names(
    scope: Scope, state_dict: Mapping[str, Any], targets: Sequence[Target]
) -> dict[str, Any]:
    """The state dict in its nested form, each parameter under the name that its optimizer uses.

    Every parameter of its groups has an entry in its states, {} if it lacks a state.
    """
    own = [names for target in targets for names in target.groups]
    state = (
        nest_optimizer_state(state_dict, own, scope.parameters)
        if is_flat(state_dict)
        else state_dict
    )
    owned = {name for names in own for name in names}
    first = scope.first_names()
    other = {n: first[id(p)] for n, p in scope.parameters.items() if n not in owned}
    groups = [
        {**group, PARAMS: [other.get(name, name) for name in group[PARAMS]]}
        for group in state.get(GROUPS, [])
    ]
    states: dict[str, Any] = {name: {} for group in groups for name in group[PARAMS]}
    states |= {other.get(name, name): value for name, value in state.get(STATE, {}).items()}
    return {STATE: states, GROUPS: groups}


def _copy_if_shared(value: Any, seen: set[int]) -> Any:
    """The value, or a copy if another parameter has the same tensor: both would change it."""
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in seen:
        return value.clone()
    seen.add(id(value))
    return value


def _compare(
    scope: Scope, targets: Sequence[Target], state: Mapping[str, Any], raw: bool
) -> tuple[Mismatch, Sequence[Group | None], dict[Any, Lack]]:
    """The mismatches of a state dict, or of the specs of one; the groups that fit; the missing
    states.

    raw: see `check_entries`.
    """
    own = [names for target in targets for names in target.groups]
    pairing = pair_groups(own, state[GROUPS], scope.frozen)
    misfits: dict[str, str] = {}
    grouped = {name for group in state[GROUPS] for name in group[PARAMS]}
    owner = {name: target for target in targets for name in target.names()}
    strangers = [
        name
        for name in state[STATE]
        if name not in grouped and name not in owner and not any(t.keeps(name) for t in targets)
    ]
    for name, entries in state[STATE].items():
        for entry, value in entries.items() if name in owner else ():
            # By entry, since a state's tensors differ: Adam's step is a scalar beside its averages.
            if why := owner[name].misfit(name, entry, value):
                misfits[f"{STATE}.{name}.{entry}"] = why
    found = [pairing.mismatch, Mismatch(unexpected=tuple(strangers), misfits=misfits)]
    lacks: dict[Any, Lack] = {}
    partners = iter(pairing.partners)
    for target in targets:
        mine = [next(partners) for _ in target.groups]
        check = check_entries(target, mine, state[STATE], grouped, raw=raw)
        found.append(check.mismatch())
        lacks |= check.lacks
    return Mismatch().merge(found), pairing.partners, lacks
