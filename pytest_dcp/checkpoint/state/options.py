"""What can be asked of the state-dict functions, under torch's names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass  # as torch's: not frozen, since programs set fields of one that they have made
class StateDictOptions:
    """How state dicts are made and loaded. One of torch's own class is taken as well."""

    full_state_dict: bool = False
    """Every tensor whole, on every rank: no DTensor and no ShardedTensor."""
    cpu_offload: bool = False
    """Tensors on the CPU. With `full_state_dict` rank 0 alone gets them; the others get {}."""
    ignore_frozen_params: bool = False
    """Parameters that require no gradient are left out, and not missed when they are not there."""
    keep_submodule_prefixes: bool = True
    """With `submodules`: whether names begin at the model, not at the submodule."""
    strict: bool = True
    """Whatever is missing, unexpected or grouped differently is an error. Otherwise what fits is
    loaded, and a group of parameters that has no counterpart keeps its own settings."""
    broadcast_from_rank0: bool = False
    """Rank 0 has the state dict, of whole tensors; the others are sent their parts. Only with
    `full_state_dict`."""
    flatten_optimizer_state_dict: bool = False
    """The optimizer's states under `state.<parameter>.<name>`, its settings under
    `param_groups.<parameter>.<setting>`: keys that do not depend on how parameters are grouped."""
    dsd_fqn_modifiers: str = "_fqn_modifiers"
    """The method by which a module whose hooks rename keys says so: {name in keys: child}."""
