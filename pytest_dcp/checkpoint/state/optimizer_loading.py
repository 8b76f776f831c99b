"""A state dict under the names of the model's parameters -> into the optimizers.

Groups find their partners by their parameters, states their parameters by name; a tied parameter
answers to each of its names. Each optimizer's own `load_state_dict` has the last word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from pytest_dcp.checkpoint.state import fsdp1
from pytest_dcp.checkpoint.state.broadcast import agreed, announced, from_rank0
from pytest_dcp.checkpoint.state.flat import GROUPS, STATE, is_flat, nested
from pytest_dcp.checkpoint.state.groups import PARAMS, Pairing, paired
from pytest_dcp.checkpoint.state.mismatch import Mismatch
from pytest_dcp.checkpoint.state.optimizer_target import Target
from pytest_dcp.checkpoint.state.scope import Scope, own_method


@torch.no_grad()
def load_optimizers(
    scope: Scope, optimizers: Sequence[Optimizer], given: Mapping[str, Any]
) -> None:
    """Load a state dict, nested or flat, into optimizers that together have its parameters.

    Tensors may be whole or sharded in any way. Collective with FSDP1, with `broadcast_from_rank0`
    and where tensors change their layout. Raises CheckpointMismatchError, naming everything at
    once, for parameters, groups and sizes that do not fit.
    """
    with fsdp1.states(scope.model):
        targets = _targets(scope, optimizers)
        state = _aligned(scope, given, targets)
        if scope.options.broadcast_from_rank0:
            states, pairing = _from_rank0(scope, targets, state)
        else:
            states, pairing = _here(scope, targets, state)
        partners = iter(pairing.partners)
        for target in targets:
            target.load(states, [next(partners) for _ in target.groups])


def _targets(scope: Scope, optimizers: Sequence[Optimizer]) -> list[Target]:
    if not fsdp1.within(scope.model):
        return [Target.of(scope, optimizer) for optimizer in optimizers]
    state = own_method(scope.model, "state_dict")()
    layouts = {scope.names.canonical(key): value for key, value in state.items()}
    return [Target.of_fsdp1(scope, optimizer, layouts) for optimizer in optimizers]


def _aligned(scope: Scope, given: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """The state dict in its nested form, each parameter under the name that its optimizer uses.

    Every parameter of its groups has an entry in its states, {} where it has none.
    """
    own = [names for target in targets for names in target.groups]
    state = nested(given, own, scope.parameters) if is_flat(given) else given
    owned = {name for names in own for name in names}
    first = scope.first_names()
    other = {n: first[p] for n, p in scope.parameters.items() if n not in owned}
    groups = [
        {**group, PARAMS: [other.get(name, name) for name in group[PARAMS]]}
        for group in state.get(GROUPS, [])
    ]
    states: dict[str, Any] = {name: {} for group in groups for name in group[PARAMS]}
    states |= {other.get(name, name): value for name, value in state.get(STATE, {}).items()}
    return {STATE: states, GROUPS: groups}


def _here(
    scope: Scope, targets: Sequence[Target], state: Mapping[str, Any]
) -> tuple[dict[str, Any], Pairing]:
    mismatch, pairing = _compared(scope, targets, state)
    mismatch.require_none("optimizer", strict=scope.options.strict)
    states = dict(state[STATE])
    seen: set[int] = set()
    for target in targets:
        for name in target.names() & states.keys():
            mine = {e: target.laid_out(name, e, value) for e, value in states[name].items()}
            states[name] = {e: _unshared(value, seen) for e, value in mine.items()}
    return states, pairing


def _unshared(value: Any, seen: set[int]) -> Any:
    """The value, or a copy where another parameter has the same tensor: both would change it."""
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) in seen:
        return value.clone()
    seen.add(id(value))
    return value


def _from_rank0(
    scope: Scope, targets: Sequence[Target], state: Mapping[str, Any]
) -> tuple[dict[str, Any], Pairing]:
    """Rank 0's state dict, each tensor in the memory that the optimizer keeps it in."""
    values = {(name, entry): v for name, of in state[STATE].items() for entry, v in of.items()}
    empty = [name for name, of in state[STATE].items() if not of]
    specs = announced({**values, GROUPS: state[GROUPS], STATE: empty})
    groups = specs.pop(GROUPS)
    states: dict[str, Any] = {name: {} for name in specs.pop(STATE)}
    for (name, entry), spec in specs.items():
        states.setdefault(name, {})[entry] = spec
    mismatch, pairing = _compared(scope, targets, {STATE: states, GROUPS: groups})
    agreed(mismatch).require_none("optimizer", strict=scope.options.strict)
    owner = {name: target for target in targets for name in target.names()}
    for (name, entry), full in from_rank0(values, specs, scope.parameters.values()):
        if name in owner:
            states[name][entry] = owner[name].filled(name, entry, full)
    return states, pairing


def _compared(
    scope: Scope, targets: Sequence[Target], state: Mapping[str, Any]
) -> tuple[Mismatch, Pairing]:
    """What of a state dict, or of the specs of one, does not fit, and which groups do."""
    own = [names for target in targets for names in target.groups]
    pairing = paired(own, state[GROUPS], scope.frozen)
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
            if why := owner[name].misfit(name, entry, value):
                misfits[f"{STATE}.{name}.{entry}"] = why
    whole = pairing.mismatch.merged([Mismatch(unexpected=tuple(strangers), misfits=misfits)])
    return whole, pairing
