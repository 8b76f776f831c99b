"""Optimizers -> their state dict under the names of the model's parameters.

{"state": {parameter: {name: value}}, "param_groups": [{..., "params": [parameter, ...]}]}, of all
optimizers together. Every parameter that can be trained has its states: its initial states if it
was never stepped. So the keys do not depend on how far training has gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from pytest_dcp._engine.state_dicts import fsdp1
from pytest_dcp._engine.state_dicts.delivery import deliver_state
from pytest_dcp._engine.state_dicts.optimizer_flattening import (
    GROUPS,
    STATE,
    flatten_optimizer_state,
)
from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS
from pytest_dcp._engine.state_dicts.optimizer_initial_states import initial_states
from pytest_dcp._engine.state_dicts.scope import Scope, own_method
from pytest_dcp.errors import CheckpointError, CheckpointMismatchError


@torch.no_grad()
def read_optimizers(scope: Scope, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """The optimizers' state dict, as the options say. The optimizers stay unchanged.

    Collective if the options ask for whole tensors, and with FSDP1. Raises CheckpointMismatchError
    for parameters that are not the model's, CheckpointError for an optimizer that must be stepped
    first, ValueError for parameters that are in two optimizers.
    """
    state: dict[str, Any] = {STATE: {}, GROUPS: []}
    for optimizer in optimizers:
        one = _read(scope, optimizer)
        if twice := _parameters_of(state) & _parameters_of(one):
            raise ValueError(f"{sorted(twice)} are in more than one of the optimizers")
        state[STATE].update(one[STATE])
        state[GROUPS] += one[GROUPS]
    state = deliver_state(_select_submodules(scope, state), scope.options)
    return (
        flatten_optimizer_state(state)
        if state and scope.options.flatten_optimizer_state_dict
        else state
    )


def group_names(scope: Scope, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of an optimizer. Not for FSDP1.

    Raises CheckpointMismatchError for parameters that are not the model's.
    """
    names = scope.first_names()
    strangers = [
        f"parameter {n} of group {at}, of size {tuple(parameter.shape)}"
        for at, group in enumerate(optimizer.param_groups)
        for n, parameter in enumerate(group[PARAMS])
        if id(parameter) not in names
    ]
    if strangers:
        raise CheckpointMismatchError(
            f"{type(optimizer).__name__} has parameters that are not the model's: "
            f"{', '.join(strangers[:20])}. Give the model that the optimizer was made for, and "
            "make the optimizer after the model was wrapped, sharded or taken off the meta device",
            unexpected=tuple(strangers),
        )
    return [[names[id(p)] for p in group[PARAMS]] for group in optimizer.param_groups]


def _read(scope: Scope, optimizer: Optimizer) -> dict[str, Any]:
    if scope.in_fsdp1:
        packed = _complete(optimizer, own_method(optimizer, "state_dict")())
        with fsdp1.states(scope):
            state_by_name = fsdp1.name_own_state(scope.model, optimizer, packed)
        keys = {*state_by_name[STATE], *_parameters_of(state_by_name)}
        return _rename_keys(state_by_name, {key: scope.names.canonical(key) for key in keys})
    names = group_names(scope, optimizer)
    packed = _complete(optimizer, own_method(optimizer, "state_dict")())
    by_id = {
        at: name
        for group, of in zip(packed[GROUPS], names, strict=True)
        for at, name in zip(group[PARAMS], of, strict=True)
    }
    return _rename_keys(packed, by_id)


def _rename_keys(state: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    """The state dict with new names for its parameters; a key without one stays."""
    return {
        STATE: {names.get(key, key): value for key, value in state.get(STATE, {}).items()},
        GROUPS: [
            {**group, PARAMS: [names.get(key, key) for key in group[PARAMS]]}
            for group in state.get(GROUPS, [])
        ],
    }


def _complete(optimizer: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's own state dict with the states of parameters that were not stepped yet."""
    states = dict(packed[STATE])
    for group, of in zip(optimizer.param_groups, packed[GROUPS], strict=True):
        # Under FSDP1 a rank may hold no elements of a parameter; then it has no state for it.
        absent = {
            at: parameter
            for at, parameter in zip(of[PARAMS], group[PARAMS], strict=True)
            if at not in states and parameter.requires_grad and parameter.numel()
        }
        try:
            new_states = initial_states(optimizer, group, list(absent.values()))
        except CheckpointError:
            if not packed[STATE]:
                raise
            # It was stepped and keeps one state for all its parameters elsewhere, as L-BFGS does.
            continue
        states |= {at: state for at, state in zip(absent, new_states, strict=True) if state}
    return {**packed, STATE: states}


def _select_submodules(scope: Scope, state: dict[str, Any]) -> dict[str, Any]:
    if scope.asks_for_all():
        return state
    keys = {name: scope.key_of(name) for name in _parameters_of(state)}
    asked_for = {name: key for name, key in keys.items() if key is not None}
    if len(set(asked_for.values())) < len(asked_for):
        raise ValueError(
            f"parameters of the submodules {list(scope.prefixes)} have the same names: ask for one "
            "of them, or keep_submodule_prefixes"
        )
    return {
        STATE: {
            asked_for.get(name, name): value
            for name, value in state[STATE].items()
            if name in asked_for or name not in keys
        },
        GROUPS: [
            {**group, PARAMS: [asked_for[name] for name in group[PARAMS] if name in asked_for]}
            for group in state[GROUPS]
        ],
    }


def _parameters_of(state: Mapping[str, Any]) -> set[str]:
    return {name for group in state[GROUPS] for name in group[PARAMS]}
