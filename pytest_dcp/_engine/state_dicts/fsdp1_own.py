"""An optimizer's own state dict within FSDP1, checked for missing parts before FSDP1 gets it.

Each rank's own state dict has the states for its part of a flat parameter, or, with
`use_orig_params`, for the parameters of which it has elements. FSDP1 joins the ranks' parts to name
them; if one rank's part is missing, its assertions fail on that rank, and the others wait for it.
So the ranks first compare their parts. Everything here is collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pytest_dcp._engine.state_dicts import fsdp1
from pytest_dcp._engine.state_dicts.mismatch import Mismatch
from pytest_dcp._engine.state_dicts.optimizer_flattening import GROUPS, STATE
from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS
from pytest_dcp._engine.state_dicts.optimizer_target import Target
from pytest_dcp._engine.state_dicts.scope import own_method
from pytest_dcp.errors import CheckpointMismatchError
from pytest_dcp.rank_names import some_ranks_text


@dataclass(frozen=True, slots=True)
class _PartState:
    """One rank's part of a parameter of which it has elements."""

    entries: frozenset[str]
    """The entries of the given state."""
    stepped: bool
    """Whether its optimizer has a state now."""


def name_parameters(target: Target, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, keyed by FSDP1's names of the original parameters.

    If no rank was given a state, the optimizer keeps its own, unless `strict`. Raises
    CheckpointMismatchError, on every rank, for missing states.
    """
    own = own_method(target.optimizer, "state_dict")()
    numbers = [number for group in state_dict[GROUPS] for number in group[PARAMS]]
    state = dict(state_dict.get(STATE, {}))
    mine = _find_part_states(target, [state.get(n, {}) for n in numbers], own)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if any(parts.entries for one in every for parts in one.values()):
        unchanged = _find_unchanged_states(target, every)
        state |= {numbers[at]: own[STATE][at] for at in unchanged if at in own[STATE]}
    try:
        return fsdp1.name_own_state(
            target.scope.model, target.optimizer, {**state_dict, STATE: state}
        )
    except RuntimeError as error:  # It names the missing parameters of a flat one.
        raise CheckpointMismatchError(
            f"FSDP1 cannot read the state dict that the optimizers of the ranks made: {error}"
        ) from error


def _find_part_states(
    target: Target, states: Sequence[Any], own: Mapping[str, Any]
) -> dict[int, _PartState]:
    parameters = [p for group in target.optimizer.param_groups for p in group[PARAMS]]
    return {
        at: _PartState(frozenset(states[at]), bool(own[STATE].get(at)))
        for at, parameter in enumerate(parameters)
        if parameter.numel()
    }


def _find_unchanged_states(target: Target, every: Sequence[Mapping[int, _PartState]]) -> list[int]:
    """The parameters that keep their states, since no rank was given one."""
    keys = _keys(target)
    unchanged: list[int] = []
    torn: dict[str, str] = {}
    for at in sorted({at for parts in every for at in parts}):
        parts = {rank: mine[at] for rank, mine in enumerate(every) if at in mine}
        entries = {rank: of.entries for rank, of in parts.items()}
        if len(set(entries.values())) > 1:
            torn[keys[at]] = _describe_torn(keys[at], entries)
        elif not any(entries.values()) and any(of.stepped for of in parts.values()):
            unchanged.append(at)
    mismatch = Mismatch(missing=tuple(keys[at] for at in unchanged), misfits=torn)
    mismatch.require_none(type(target.optimizer).__name__, strict=target.scope.options.strict)
    return unchanged


def _keys(target: Target) -> list[str]:
    """The name of each parameter's state: its number if it is a flat parameter."""
    names = [name for group in target.groups for name in group]
    count = sum(len(group[PARAMS]) for group in target.optimizer.param_groups)
    return [f"{STATE}.{names[at] if count == len(names) else at}" for at in range(count)]


def _describe_torn(key: str, entries: Mapping[int, frozenset[str]]) -> str:
    whole = frozenset().union(*entries.values())
    lacking = [rank for rank, of in entries.items() if of != whole]
    lost = sorted(whole - frozenset.intersection(*entries.values()))
    return (
        f"{key!r}: {', '.join(map(repr, lost))} missing on {some_ranks_text(lacking)}, of its part"
    )
