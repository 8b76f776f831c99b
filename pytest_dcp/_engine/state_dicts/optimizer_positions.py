"""An optimizer's own state dict, whose parameters are numbers -> the same with the model's names.

`optimizer.state_dict()` numbers the parameters through all groups. The numbers mean the same for
another optimizer only if its groups hold as many parameters, in the same order; its own
`load_state_dict` requires no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_dcp._engine.state_dicts.fsdp1_own import name_parameters
from pytest_dcp._engine.state_dicts.optimizer_flattening import GROUPS, STATE
from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS
from pytest_dcp._engine.state_dicts.optimizer_target import Target
from pytest_dcp.errors import CheckpointMismatchError


def is_positional(state_dict: Mapping[str, Any]) -> bool:
    """Whether the parameters of a state dict are numbers."""
    listed = [key for group in state_dict.get(GROUPS, ()) for key in group[PARAMS]]
    return bool(listed) and all(isinstance(key, int) for key in listed)


def name_positions(targets: Sequence[Target], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the names of the parameters. Collective with FSDP1.

    Raises CheckpointMismatchError for more than one optimizer, and for groups of other sizes.
    """
    sizes = [len(group[PARAMS]) for group in state_dict[GROUPS]]
    if len(targets) != 1:
        raise CheckpointMismatchError(
            f"the state dict has numbers for its {sum(sizes)} parameters, as one optimizer's own "
            f"state_dict() has: the numbers do not show to which of the {len(targets)} optimizers "
            "they refer. Load each optimizer with a state dict of its own, or make one state dict "
            "of all with get_optimizer_state_dict"
        )
    (target,) = targets
    own = [len(group[PARAMS]) for group in target.optimizer.param_groups]
    if sizes != own:
        raise CheckpointMismatchError(
            "the state dict has numbers for its parameters, as an optimizer's own state_dict() "
            f"has, in groups of {sizes}; the groups of {type(target.optimizer).__name__} hold "
            f"{own}: make the optimizer with the groups that were saved, or save the state dict of "
            "get_optimizer_state_dict, which has names"
        )
    if target.fsdp_names:
        if target.scope.options.broadcast_from_rank0:
            raise CheckpointMismatchError(
                "the state dict has numbers for its parameters, as an optimizer's own "
                "state_dict() has: within FSDP1 that is the state of one rank's parts, which "
                "broadcast_from_rank0 cannot give the others. Save the state dict of "
                "get_optimizer_state_dict with full_state_dict=True"
            )
        named_state = name_parameters(target, state_dict)
        canonical = target.scope.names.canonical
        return _rename_positions(
            named_state, {theirs: canonical(theirs) for theirs in named_state[STATE]}, target
        )
    numbers = [number for group in state_dict[GROUPS] for number in group[PARAMS]]
    names = [name for group in target.groups for name in group]
    return _rename_positions(state_dict, dict(zip(numbers, names, strict=True)), target)


def _rename_positions(
    state: Mapping[str, Any], names: Mapping[Any, str], target: Target
) -> dict[str, Any]:
    return {
        STATE: {names.get(key, key): value for key, value in state.get(STATE, {}).items()},
        GROUPS: [
            {**group, PARAMS: own} for group, own in zip(state[GROUPS], target.groups, strict=True)
        ],
    }
