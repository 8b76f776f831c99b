"""Canonical names, of models that are wrapped without a process group."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)

from pytest_dcp._engine.state_dicts.canonical_names import Names, wrapped_as


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in Names(model).parameters()]


BARE = ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]


def test_wrappers_leave_no_trace_in_any_order() -> None:
    assert names_of(net()) == BARE
    model = net()
    model[0] = checkpoint_wrapper(offload_wrapper(model[0]))
    model[1] = offload_wrapper(checkpoint_wrapper(model[1]))
    assert names_of(checkpoint_wrapper(model)) == BARE
    names = Names(model)
    assert [names.canonical(key) for key in model.state_dict()] == BARE


def test_a_child_named_as_a_wrappers_keeps_its_name() -> None:
    model = torch.nn.Module()
    model.module = torch.nn.Linear(2, 2)
    model._orig_mod = torch.nn.Linear(2, 2)
    assert names_of(model) == ["module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"]


def test_a_tied_parameter_has_all_its_names() -> None:
    model = net()
    model[1][0].weight = model[0].weight
    found = dict(Names(model).parameters())
    assert found["0.weight"] is found["1.0.weight"]


class Renamer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "inner", "bias": "inner"}


def test_a_module_may_say_which_child_its_keys_leave_out() -> None:
    model = torch.nn.Sequential(checkpoint_wrapper(Renamer()))
    assert names_of(model) == ["0.weight", "0.bias"]
    assert Names(model).canonical("0.weight") == "0.weight"
    assert [n for n, _ in Names(model, "other_method").parameters()] == [
        "0.inner.weight",
        "0.inner.bias",
    ]


def test_one_module_or_a_forwarding_class_may_rename_too() -> None:
    class Forwarding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

        def __getattr__(self, name: str) -> object:
            if name == "_fqn_modifiers":
                return lambda: {"weight": "inner", "bias": "inner"}
            return super().__getattr__(name)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

    model = torch.nn.Sequential(Forwarding(), Plain(), Plain())
    model[2]._fqn_modifiers = lambda: {"weight": "inner", "bias": "inner"}
    assert names_of(model) == [
        "0.weight", "0.bias", "1.inner.weight", "1.inner.bias", "2.weight", "2.bias",
    ]  # fmt: skip


def test_an_unknown_key_is_unchanged() -> None:
    names = Names(checkpoint_wrapper(net()))
    assert names.canonical("gone.deeper.key") == "gone.deeper.key"
    assert names.canonical("_checkpoint_wrapped_module.0._extra_state") == "0._extra_state"


def test_prefixes_of_submodules() -> None:
    model = net()
    inner = model[1]
    model[1] = checkpoint_wrapper(inner)
    names = Names(model)
    assert names.prefixes([inner]) == ("1.",)
    assert names.prefixes([model[1], model[0]]) == ("0.", "1.")
    assert names.prefixes([model]) == ("",)
    with pytest.raises(ValueError, match=r"1 of the submodules are not in the model: \['Linear'\]"):
        names.prefixes([torch.nn.Linear(2, 2), inner])


def test_torchs_wrappers_are_known_under_the_names_they_have() -> None:
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    assert wrapped_as(OptimizedModule) == "_orig_mod"
    assert wrapped_as(FullyShardedDataParallel) == "_fsdp_wrapped_module"
    assert wrapped_as(DistributedDataParallel) == "module"
    assert wrapped_as(type(checkpoint_wrapper(net()))) == "_checkpoint_wrapped_module"
    assert wrapped_as(torch.nn.Linear) is None
