"""Models and optimizers to and from state dicts that name everything by the bare model's names.

The state dict of a wrapped model has the wrappers in its names, and an optimizer's has numbers for
names. Neither loads into the same model wrapped in another way. Here everything has a *canonical
name*: the name that it would have if nothing wrapped the model (`canonical_names`). The calls are
torch's; see `checkpoint.state_dict`.

Reading a model (`model.read_model`): FSDP2 restores its sharded parameters (`scope`), FSDP1 is set
to sharded states (`fsdp1`), the model's own `state_dict` runs with all its hooks, each key becomes
canonical, and the tensors are delivered as the options say: sharded or gathered, on their device or
on the CPU (`delivery`).

Reading optimizers (`optimizer_reading`): each parameter's states are put under its first canonical
name. A parameter that was never stepped gets the initial states of its optimizer
(`optimizer_initial_states`), so the keys do not depend on how far training has gone.

Setting goes the other way, in two halves:

1. Compare. Every key, group, entry and size of the state dict is compared with the model or the
   optimizers, and one error names everything that does not fit (`mismatch`). Optimizers have not
   changed by then (`optimizer_loading.check_optimizers`), and `set_state_dict` compares them before
   it loads the model. The model's own hooks may accept keys that its state dict does not show; such
   a model reports missing keys itself, after loading.
2. Fill. Each tensor, whole or sharded in any other way, gets the layout of its target (`parts`),
   and the model's or optimizer's own `load_state_dict` has the last word.

With `broadcast_from_rank0` only rank 0 has the state dict. Ranks first learn names and sizes, agree
that everything fits, and then get the tensors bucket by bucket (`broadcast`), each keeping its
part.

Collective calls: without FSDP1, and without options that gather or send, reading is local.
Everything else may be collective, so an exception in one rank could leave the others in a
collective for ever. When rank 0 sends, a failed rank still goes on to the next collective, reports
the failure there, and raises after it (`agreement`).

Assumes that the ranks call with the same options, and that all ranks have the same model.
Guarantees that reading changes nothing, that a state dict from one wrapping loads into any other,
and that a rank in which the comparison raises has changed nothing.
"""
