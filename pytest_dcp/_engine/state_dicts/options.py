"""Options of the state-dict functions: torch's own class, so that one object serves both.

`full_state_dict`: every tensor whole, on every rank. `cpu_offload`: tensors on the CPU; with
`full_state_dict` rank 0 alone gets them, the others {}. `ignore_frozen_params`: parameters that
require no gradient are left out, and not missed. `keep_submodule_prefixes`: with `submodules`,
whether names begin at the model. `strict`: missing, unexpected or differently grouped names are an
error; otherwise everything that fits is loaded. `broadcast_from_rank0`: rank 0 has the state dict,
of whole tensors, and the others are sent their parts; only with `full_state_dict`.
`flatten_optimizer_state_dict`: states under `state.<parameter>.<name>`, settings under
`param_groups.<parameter>.<setting>`: keys that do not depend on how parameters are grouped.
`dsd_fqn_modifiers`: the method of a module that returns how its hooks rename keys, {name in keys:
child}.
"""

from torch.distributed.checkpoint.state_dict import StateDictOptions

__all__ = ["StateDictOptions"]
