"""Models and optimizers to and from state dicts that name everything by the bare model's names.

The state dict of a wrapped model has the wrappers in its names, and an optimizer's has numbers for
names. Neither loads into the same model wrapped in another way. Here everything is under *canonical
names*: those that the model's parameters would have if nothing wrapped it (`names`). The calls are
torch's; see `checkpoint.state_dict`.

Reading a model (`model.read_model`): FSDP2 gives its sharded parameters back (`scope`), FSDP1 is
asked for sharded states (`fsdp1`), the model's own `state_dict` is called with all its hooks, each
key is made canonical, and the tensors are delivered as the options want them: sharded or gathered,
where they are or on the CPU (`delivery`).

Reading optimizers (`optimizer_reading`): each parameter's states are put under its first canonical
name. A parameter that was never stepped gets the states that its optimizer would begin with
(`initial`), so that the keys do not depend on how long was trained.

Setting goes the other way, in two halves:

1. Compare. Every key, group, entry and size of what is given is compared with the model or the
   optimizers, and one error names everything that does not fit (`mismatch`). Optimizers have not
   changed by then (`optimizer_loading.check_optimizers`), and `set_state_dict` compares them before
   it loads the model. The model's own hooks may know keys that its state dict does not show; such
   a model says itself what it missed, after the fact.
2. Fill. Each tensor is laid out as its target is (`parts`), from whole or sharded in any other way,
   and the model's or optimizer's own `load_state_dict` has the last word.

With `broadcast_from_rank0` only rank 0 has the state dict. Ranks first learn names and sizes, agree
that everything fits, and then get the tensors bucket by bucket (`broadcast`), each keeping its
part.

Who must come: without FSDP1, and without options that gather or send, reading is local. Everything
else may be collective, so an exception in one rank could leave the others in a collective for ever.
Where rank 0 sends, each rank goes on to the next collective all the same, says there that it
failed, and raises after it (`agreement`).

Assumes that the ranks call with the same options, and that models are alike in all ranks.
Guarantees that reading changes nothing, that what one wrapping gives any other takes, and that a
rank in which the comparison raises has changed nothing.
"""
