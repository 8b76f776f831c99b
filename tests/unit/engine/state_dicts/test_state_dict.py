"""State dicts without a process group: saving and loading a model and its optimizer."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from typing import Any, get_type_hints

import pytest
import torch
import torch.distributed.checkpoint.state_dict as torchs
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import pytest_dcp.checkpoint.state_dict as ours
from pytest_dcp.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from pytest_dcp.errors import CheckpointError, CheckpointMismatchError

LOOSE = StateDictOptions(strict=False)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 4)
        self.two = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.two(torch.relu(self.one(x)))
        return out


ALL = ["one.weight", "one.bias", "two.weight", "two.bias"]


def train(model: torch.nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 2) -> float:
    for _ in range(steps):
        loss = model(torch.linspace(-1, 1, 6).reshape(2, 3)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


def adamw(model: torch.nn.Module, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **more)


# The interface.


def test_options_have_torchs_fields_and_defaults() -> None:
    def fields(kind: Any) -> list[Any]:
        types = get_type_hints(kind)
        return [(f.name, types[f.name], f.default) for f in dataclasses.fields(kind)]

    assert fields(StateDictOptions) == fields(torchs.StateDictOptions)


def test_aliases_are_torchs() -> None:
    for name in ("FQNS_T", "PrimitiveType", "DictValueType", "OptimizerStateType"):
        assert getattr(ours, name) == getattr(torchs, name)


def test_patched_models_and_optimizers_give_and_take_canonical_states() -> None:
    model = checkpoint_wrapper(Net())
    optimizers = adamw(model.one), torch.optim.SGD(model.two.parameters(), momentum=0.5)
    train(model, *optimizers)
    expected = copy.deepcopy(get_state_dict(model, optimizers))
    ours._patch_model_state_dict(model)
    ours._patch_optimizer_state_dict(model, optimizers=optimizers)
    for _ in range(2):  # A second patch of what is patched changes nothing.
        same(model.state_dict(), expected[0])
        for optimizer in optimizers:
            same(optimizer.state_dict(), expected[1])
        train(model, *optimizers)
        model.load_state_dict(expected[0])
        optimizers[0].load_state_dict(copy.deepcopy(expected[1]))
        ours._patch_model_state_dict(model)
        ours._patch_optimizer_state_dict(model, optimizers=optimizers)


def same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    else:
        assert one == other


# The model.


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(3, 4)
        self.head = torch.nn.Linear(4, 3)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(x.argmax(-1)))
        return out


def test_a_tied_weight_has_both_names_in_the_model_and_the_first_in_the_optimizer() -> None:
    model = Tied()
    optimizer = adamw(model)
    train(model, optimizer)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    assert list(state) == ["embedding.weight", "head.weight", "head.bias"]
    assert list(optimizer_state["state"]) == ["embedding.weight", "head.bias"]
    other = Tied()
    other_optimizer = adamw(other)
    renamed = {"head.weight": optimizer_state["state"].pop("embedding.weight")}
    optimizer_state["state"].update(renamed)
    optimizer_state["param_groups"][0]["params"] = ["head.weight", "head.bias"]  # type: ignore[index,call-overload]
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert other.head.weight is other.embedding.weight
    assert train(other, other_optimizer) == train(model, optimizer)


class Counting(torch.nn.Module):
    """Extra state, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = 0
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "at": torch.tensor(3)}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state_comes_along_and_scratch_buffers_do_not() -> None:
    counting = Counting()
    counting.seen = "much"
    model = torch.nn.Sequential(checkpoint_wrapper(counting))
    state = get_model_state_dict(model)
    assert list(state) == ["0.weight", "0._extra_state"]
    other = torch.nn.Sequential(Counting())
    assert set_model_state_dict(other, state) == ([], [])
    assert other[0].seen == "much"
    del state["0._extra_state"]
    with pytest.raises(CheckpointMismatchError, match=r'Missing key\(s\) .*: "0\._extra_state"\.'):
        set_model_state_dict(other, state)


class Renaming(torch.nn.Module):
    """Its hooks call `inner.weight` plainly `weight`, and know an older name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 3, bias=False)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "inner.weight")

    @staticmethod
    def _rename_back(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "old_weight"):
            if prefix + name in state:
                state[prefix + "inner.weight"] = state.pop(prefix + name)

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "inner"}

    def _other_modifiers(self) -> dict[str, str]:
        return {}


def renaming() -> torch.nn.Module:
    return torch.nn.Sequential(checkpoint_wrapper(Renaming()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_hooks_may_rename_keys(device: str) -> None:
    model = renaming()
    state = get_model_state_dict(model)
    assert list(state) == ["0.weight"]
    with torch.device(device):
        other = renaming()
    set_model_state_dict(other, state)
    same(get_model_state_dict(other), state)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    assert list(get_optimizer_state_dict(model, optimizer)["state"]) == ["0.weight"]
    options = StateDictOptions(dsd_fqn_modifiers="_other_modifiers")
    by_path = get_optimizer_state_dict(model, optimizer, options=options)
    assert list(by_path["state"]) == ["0.inner.weight"]


def test_a_key_that_only_the_models_hooks_know_is_theirs() -> None:
    model, other = renaming(), checkpoint_wrapper(renaming())
    old = {"0.old_weight": get_model_state_dict(model)["0.weight"]}
    assert set_model_state_dict(other, old) == ([], [])
    same(get_model_state_dict(other), get_model_state_dict(model))


def test_a_meta_model_gets_tensors_of_its_own() -> None:
    state = get_model_state_dict(Net().to(torch.float64))
    with torch.device("meta"):
        model = Net()
    model.two = torch.nn.Linear(4, 2)  # A part that is there already stays the same object.
    kept = model.two.weight
    model.one.weight.requires_grad_(False)
    set_model_state_dict(model, state)
    assert model.two.weight is kept
    assert not model.one.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same(get_model_state_dict(model), {k: v.float() for k, v in state.items()})  # type: ignore[union-attr]
    assert all(p.data_ptr() != state[n].data_ptr() for n, p in model.named_parameters())  # type: ignore[union-attr]


def test_everything_that_does_not_fit_a_model_is_named_at_once() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    state = {"one.weigth": torch.ones(4, 3), "two.weight": torch.ones(2, 5), "two.bias": 3}
    with pytest.raises(CheckpointMismatchError) as caught:
        set_model_state_dict(model, state)  # type: ignore[arg-type]
    error = caught.value
    assert error.missing == ("one.weight", "one.bias")
    assert error.unexpected == ("one.weigth",)
    assert error.mismatched == ("two.weight", "two.bias")
    assert "Error(s) in loading state_dict for Net:" in str(error)
    assert 'Missing key(s) in state_dict: "one.weight", "one.bias".' in str(error)
    assert 'Unexpected key(s) in state_dict: "one.weigth".' in str(error)
    assert '"one.weight" (nearest: "one.weigth")' in str(error)
    assert (
        "size mismatch for two.weight: copying a param with shape torch.Size([2, 5]) from "
        "checkpoint, the shape in current model is torch.Size([2, 4])."
    ) in str(error)
    assert "'two.bias': expected a tensor of size (2,), got int" in str(error)
    same(model.state_dict(), before)


def test_fitting_entries_are_loaded_unless_strict() -> None:
    model = Net()
    state = {"one.weight": torch.ones(4, 3), "more": torch.ones(1)}
    with pytest.raises(CheckpointMismatchError, match=r'Missing.*\n.*Unexpected.*"more"'):
        set_model_state_dict(model, state)
    keys = set_model_state_dict(model, state, options=LOOSE)
    assert keys.missing_keys == ALL[1:]
    assert keys.unexpected_keys == ["more"]
    same(model.one.weight.detach(), torch.ones(4, 3))
    with pytest.raises(CheckpointMismatchError, match=r"size mismatch for one\.bias: copying"):
        set_model_state_dict(model, {"one.bias": torch.ones(9)}, options=LOOSE)


def test_an_empty_state_dict_misses_everything() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        set_model_state_dict(Net(), {})
    assert caught.value.missing == tuple(ALL)
    model = Net()
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, adamw(model), {})
    assert caught.value.missing == tuple(ALL)


def test_options_that_contradict_each_other_are_refused() -> None:
    options = StateDictOptions(broadcast_from_rank0=True)
    with pytest.raises(ValueError, match="full_state_dict must be True"):
        set_model_state_dict(Net(), {}, options=options)


# Parts of models.


def test_submodules_are_filtered_with_and_without_their_prefixes() -> None:
    model = torch.nn.Sequential(Net(), checkpoint_wrapper(Net()))
    optimizer = adamw(model)
    part = {model[1].one}
    state, optimizer_state = get_state_dict(model, optimizer, submodules=part)
    assert list(state) == list(optimizer_state["state"]) == ["1.one.weight", "1.one.bias"]
    assert optimizer_state["param_groups"][0]["params"] == list(state)  # type: ignore[index,call-overload]
    bare = StateDictOptions(keep_submodule_prefixes=False)
    state, optimizer_state = get_state_dict(model, optimizer, submodules=part, options=bare)
    assert list(state) == list(optimizer_state["state"]) == ["weight", "bias"]
    both = {model[0].one, model[1].one}
    with pytest.raises(ValueError, match="more than one of the submodules"):
        get_model_state_dict(model, submodules=both, options=bare)
    with pytest.raises(ValueError, match="have the same names"):
        get_optimizer_state_dict(model, optimizer, submodules=both, options=bare)


def test_state_dicts_of_submodules_are_put_together() -> None:
    model, other = Net(), Net()
    parts: Any = {other.one: model.one.state_dict(), other.two: model.two.state_dict()}
    set_model_state_dict(other, parts)
    same(other.state_dict(), model.state_dict())


def frozen_net() -> Net:
    model = Net()
    model.one.requires_grad_(False)
    return model


def test_frozen_parameters_are_left_out_and_not_missed() -> None:
    options = StateDictOptions(ignore_frozen_params=True)
    model, other = frozen_net(), frozen_net()
    optimizer, other_optimizer = adamw(model), adamw(other)
    train(model, optimizer)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    assert list(state) == ALL[2:]
    assert optimizer_state["param_groups"][0]["params"] == ALL[2:]  # type: ignore[index,call-overload]
    frozen = copy.deepcopy(other.one.state_dict())
    keys = set_state_dict(
        other,
        other_optimizer,
        model_state_dict=state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    assert keys == ([], [])
    same(other.one.state_dict(), frozen)
    same(other.two.state_dict(), model.two.state_dict())
    same(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("flat", [False, True])
def test_a_partly_frozen_model_goes_round(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = frozen_net(), frozen_net()
    optimizer, other_optimizer = adamw(model), adamw(other, lr=3.0)
    train(model, optimizer)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    assert other_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert train(other, other_optimizer) == train(model, optimizer)


# Optimizers.


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (torch.optim.AdamW, {"lr": torch.tensor(0.25)}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
        (torch.optim.Adafactor, {}),
        (torch.optim.Rprop, {}),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_every_kind_of_optimizer_goes_round(kind: Any, more: Any, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Net(), Net()
    optimizer, other_optimizer = kind(model.parameters(), **more), kind(other.parameters(), **more)
    train(model, optimizer)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    assert train(other, other_optimizer) == train(model, optimizer)


def test_getting_the_state_of_an_unstepped_optimizer_changes_nothing() -> None:
    model, bare = Net(), Net()
    bare.load_state_dict(model.state_dict())
    optimizer = adamw(model)
    loss = model(torch.ones(1, 3)).sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert all(of["step"] == 0 for of in state.values())  # type: ignore[union-attr,index,call-overload]
    assert not optimizer.state
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    optimizer.zero_grad()
    assert train(model, optimizer) == train(bare, adamw(bare))


def test_a_parameter_that_was_not_used_has_its_first_state() -> None:
    model = Net()
    optimizer = adamw(model)
    model.one(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert list(state) == [*ALL[:2], *ALL[2:]]
    assert [float(of["step"]) for of in state.values()] == [1, 1, 0, 0]  # type: ignore[union-attr,index,call-overload,arg-type]
    other = Net()
    other.load_state_dict(model.state_dict())
    other_optimizer = adamw(other)
    set_optimizer_state_dict(
        other, other_optimizer, copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    )
    assert train(other, other_optimizer) == train(model, optimizer)


def test_an_optimizer_that_keeps_one_state_for_all_goes_round_once_it_was_stepped() -> None:
    model, other = Net(), Net()
    optimizer, other_optimizer = (torch.optim.LBFGS(m.parameters()) for m in (model, other))

    def loss_of(m: torch.nn.Module, o: torch.optim.Optimizer) -> Any:
        def closure() -> torch.Tensor:
            o.zero_grad()
            loss: torch.Tensor = m(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        return closure

    with pytest.raises(CheckpointError, match="step it once"):
        get_optimizer_state_dict(model, optimizer)
    optimizer.step(loss_of(model, optimizer))
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert other_optimizer.step(loss_of(other, other_optimizer)) == optimizer.step(
        loss_of(model, optimizer)
    )


class Odd(torch.optim.Optimizer):
    """States that are not tensors, of other sizes than the parameter, or of no parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5, "schedule": {"kind": "odd", "at": [1, 2]}})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["calls"] = self.state.get("calls", 0) + 1  # type: ignore[index,call-overload]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(steps=0, rows=torch.zeros(len(p)), notes={"m": torch.zeros(3)})
                state["steps"] += 1
                state["rows"] += p.grad.reshape(len(p), -1).sum(1)
                p -= 0.1 * state["rows"].reshape(-1, *[1] * (p.ndim - 1))


def test_states_of_any_kind_go_round() -> None:
    model, other = Net(), Net()
    optimizer, other_optimizer = Odd(model.parameters()), Odd(other.parameters())
    train(model, optimizer)
    other_optimizer.state["calls"] = 0  # type: ignore[index]  # as the optimizer does
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    assert optimizer_state["state"]["calls"] == 2  # type: ignore[call-overload]
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert train(other, other_optimizer) == train(model, optimizer)
    assert other_optimizer.state["calls"] == optimizer.state["calls"] == 4  # type: ignore[index]
    assert other_optimizer.param_groups[0]["schedule"] == {"kind": "odd", "at": [1, 2]}


def test_an_optimizer_in_the_backward_pass_goes_round() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # The package's import uses TorchScript.
        from torch.distributed.optim import _apply_optimizer_in_backward

    model, other = Net(), Net()
    for net in (model, other):
        _apply_optimizer_in_backward(torch.optim.AdamW, net.parameters(), {"lr": 0.1})
    optimizers, other_optimizers = (
        [p._in_backward_optimizers[0] for p in m.parameters()]  # type: ignore[attr-defined]
        for m in (model, other)
    )
    before = copy.deepcopy(model.state_dict())
    get_state_dict(model, optimizers)
    same(model.state_dict(), before)
    train(model)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizers))
    assert [group["params"] for group in optimizer_state["param_groups"]] == [[n] for n in ALL]  # type: ignore[index,call-overload]
    set_state_dict(
        other, other_optimizers, model_state_dict=state, optim_state_dict=optimizer_state
    )
    assert train(other) == train(model)


# Groups.


def grouped(model: Net, order: str) -> torch.optim.Optimizer:
    groups = {
        "w": {"params": [model.one.weight, model.two.weight], "lr": 0.1},
        "b": {"params": [model.two.bias, model.one.bias], "lr": 0.2, "weight_decay": 0.0},
        "e": {"params": [], "lr": 0.3},
    }
    return torch.optim.AdamW([dict(groups[key]) for key in order], lr=9.0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("saved", "loaded"), [*itertools.product(["wb", "bw"], ["wb", "bw"]), ("ewb", "bew")]
)
def test_groups_in_another_order_keep_their_settings(saved: str, loaded: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Net(), Net()
    optimizer, other_optimizer = grouped(model, saved), grouped(other, loaded)
    train(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= 10
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=state,
        optim_state_dict=optimizer_state,
        options=options,
    )
    lrs = {"w": 1.0, "b": 2.0, "e": 0.3 if flat else 3.0}
    assert [group["lr"] for group in other_optimizer.param_groups] == [lrs[k] for k in loaded]
    assert train(other, other_optimizer) == train(model, optimizer)


def test_several_optimizers_share_a_state_dict() -> None:
    model, other = Net(), Net()
    optimizers = adamw(model.one), torch.optim.SGD(model.two.parameters(), momentum=0.5)
    others = torch.optim.SGD(other.two.parameters(), momentum=0.5), adamw(other.one)
    train(model, *optimizers)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizers))
    set_state_dict(other, others, model_state_dict=state, optim_state_dict=optimizer_state)
    assert train(other, *others) == train(model, *optimizers)
    with pytest.raises(ValueError, match="more than one of the optimizers"):
        get_optimizer_state_dict(model, (optimizers[0], optimizers[0]))


def test_everything_that_does_not_fit_optimizers_is_named_at_once() -> None:
    model = Net()
    optimizer = grouped(model, "wb")
    state: Any = get_optimizer_state_dict(model, optimizer)
    state["param_groups"][1]["params"] = ["two.bias", "stranger"]
    state["state"]["ghost"] = {"step": torch.tensor(1.0)}
    state["state"]["one.weight"]["exp_avg"] = torch.ones(7, 7)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught.value.missing == ("one.bias",)
    assert caught.value.unexpected == ("stranger", "ghost")
    assert caught.value.mismatched == ("state.one.weight.exp_avg",)
    assert "state 'exp_avg' of 'one.weight': expected size (4, 3), got (7, 7)" in str(caught.value)
    same(optimizer.state_dict(), before)


def test_groups_that_do_not_match_are_named_or_keep_their_settings() -> None:
    model, other = Net(), Net()
    optimizer, other_optimizer = adamw(model, lr=0.5), grouped(other, "wb")
    train(model, optimizer)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    with pytest.raises(CheckpointMismatchError, match="parameter group 0 of the optimizer"):
        set_optimizer_state_dict(other, other_optimizer, state)
    set_optimizer_state_dict(other, other_optimizer, state, options=LOOSE)
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.1, 0.2]
    same(
        get_optimizer_state_dict(other, other_optimizer)["state"],
        get_optimizer_state_dict(model, optimizer)["state"],
    )


def test_a_tensor_that_parameters_share_is_loaded_for_each() -> None:
    """As torch gets it from FSDP1, whose flattened parameters count their steps together."""
    model, other = Net(), Net()
    optimizer, other_optimizer = adamw(model), adamw(other)
    train(model, optimizer)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    shared = torch.tensor(2.0)
    for entries in optimizer_state["state"].values():
        entries["step"] = shared  # type: ignore[index,call-overload]
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert train(other, other_optimizer) == train(model, optimizer)


@pytest.mark.parametrize("flat", [False, True])
def test_a_part_of_the_state_is_loaded_unless_strict(flat: bool) -> None:
    model, other = Net(), Net()
    optimizer, other_optimizer = adamw(model), adamw(other)
    train(model, optimizer)
    train(other, other_optimizer, steps=5)
    options = StateDictOptions(strict=False, flatten_optimizer_state_dict=flat)
    state = copy.deepcopy(
        get_optimizer_state_dict(model, optimizer, submodules={model.one}, options=options)
    )
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(other, other_optimizer, state)
    assert caught.value.missing == tuple(ALL[2:])
    set_optimizer_state_dict(other, other_optimizer, state, options=options)
    loaded: Any = get_optimizer_state_dict(other, other_optimizer)["state"]
    assert [float(loaded[name]["step"]) for name in ALL] == [2, 2, 5, 5]


def test_parameters_that_are_not_the_models_are_named() -> None:
    model = Net()
    optimizer = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(7))])
    with pytest.raises(CheckpointMismatchError, match=r"parameter 4 of group 0, of size \(7,\)"):
        get_optimizer_state_dict(model, optimizer)


def test_an_optimizer_of_meta_parameters_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    optimizer = adamw(model)
    source = Net()
    state = get_optimizer_state_dict(source, adamw(source))
    with pytest.raises(CheckpointMismatchError, match="load the model first"):
        set_optimizer_state_dict(model, optimizer, state)


# Entries of states.


def trained(kind: Any = torch.optim.AdamW, **more: Any) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = kind(model.parameters(), **more)
    train(model, optimizer)
    return model, optimizer


def options_for(flat: bool, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat, strict=strict)


def without(state: Any, name: str, entry: str | None, flat: bool) -> Any:
    """The state dict without a parameter's state, or one entry of it."""
    if flat:
        start = f"state.{name}."
        return {
            key: value
            for key, value in state.items()
            if not (key.startswith(start) if entry is None else key == start + entry)
        }
    if entry is None:
        del state["state"][name]
    else:
        del state["state"][name][entry]
    return state


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("entry", [None, "exp_avg", "step"])
def test_a_state_or_an_entry_that_is_missing_is_named_and_nothing_changes(
    entry: str | None, stepped: bool, flat: bool
) -> None:
    model, optimizer = trained()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options_for(flat)))
    broken = without(state, "two.weight", entry, flat)
    other = Net()
    other_optimizer = adamw(other)
    if stepped:
        train(other, other_optimizer, steps=5)
    before = copy.deepcopy(other_optimizer.state_dict())
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(other, other_optimizer, broken)
    key = "state.two.weight" + (f".{entry}" if entry else "")
    assert caught.value.missing == (key,)
    assert caught.value.unexpected == ()
    assert f'Missing key(s) in state_dict: "{key}".' in str(caught.value)
    same(other_optimizer.state_dict(), before)


@pytest.mark.parametrize("flat", [False, True])
def test_an_entry_that_the_optimizer_does_not_know_is_unexpected(flat: bool) -> None:
    model, optimizer = trained()
    state: Any = get_optimizer_state_dict(model, optimizer, options=options_for(flat))
    state = copy.deepcopy(state)
    (state if flat else state["state"]["one.bias"])["state.one.bias.more" if flat else "more"] = 3
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught.value.unexpected == ("state.one.bias.more",)


@pytest.mark.parametrize("flat", [False, True])
def test_the_state_of_another_kind_of_optimizer_is_refused(flat: bool) -> None:
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer, options=options_for(flat))
    other = Net()
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(other, torch.optim.RMSprop(other.parameters()), state)
    assert set(caught.value.missing) == {f"state.{name}.square_avg" for name in ALL}
    assert set(caught.value.unexpected) == {
        f"state.{name}.{entry}" for name in ALL for entry in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, {}),
        (torch.optim.AdamW, {}, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}, {}),
        (torch.optim.SGD, {}, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_the_settings_that_are_loaded_say_which_entries_belong(
    kind: Any, saved: Any, loaded: Any, stepped: bool
) -> None:
    model, optimizer = trained(kind, **saved)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    other = Net()
    other_optimizer = kind(other.parameters(), **loaded)
    if stepped:
        train(other, other_optimizer)
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    assert train(other, other_optimizer) == train(model, optimizer)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("entry", [None, "exp_avg"])
def test_missing_entries_leave_their_targets_unchanged_unless_strict(
    entry: str | None, flat: bool
) -> None:
    model, optimizer = trained()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options_for(flat)))
    other = Net()
    other_optimizer = adamw(other)
    train(other, other_optimizer, steps=5)
    own = copy.deepcopy(other_optimizer.state[other.two.weight])
    broken = without(state, "two.weight", entry, flat)
    set_optimizer_state_dict(other, other_optimizer, broken, options=options_for(flat, False))
    now = other_optimizer.state[other.two.weight]
    same(now["exp_avg"], own["exp_avg"])
    assert float(now["step"]) == (5 if entry is None else 2)
    assert float(other_optimizer.state[other.one.weight]["step"]) == 2
    train(other, other_optimizer)


def test_a_missing_entry_of_an_unstepped_optimizer_begins_anew_unless_strict() -> None:
    model, optimizer = trained()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = Net()
    other_optimizer = adamw(other)
    broken = without(state, "two.weight", "exp_avg", False)
    set_optimizer_state_dict(other, other_optimizer, broken, options=LOOSE)
    assert not other_optimizer.state[other.two.weight]["exp_avg"].any()
    train(other, other_optimizer)


def test_a_missing_state_of_all_parameters_is_named() -> None:
    model, optimizer = trained(Odd)
    state: Any = get_optimizer_state_dict(model, optimizer)
    del state["state"]["calls"]
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught.value.missing == ("state.calls",)
    set_optimizer_state_dict(model, optimizer, state, options=LOOSE)
    assert optimizer.state["calls"] == 2  # type: ignore[index]


def test_a_group_without_settings_is_missed() -> None:
    model, optimizer = trained(lr=0.5)
    state: Any = get_optimizer_state_dict(model, optimizer)
    state["param_groups"] = [{"params": state["param_groups"][0]["params"]}]
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught.value.missing == ("param_groups.one.weight",)


@pytest.mark.parametrize("form", ["named", "flat", "own"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_setting_that_every_step_needs_is_missed(form: str, strict: bool) -> None:
    model, optimizer = trained(lr=0.5)
    options = options_for(form == "flat", strict)
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)
    state = copy.deepcopy(optimizer.state_dict() if form == "own" else state)
    for group in [state] if form == "flat" else state["param_groups"]:
        for key in [key for key in group if key.split(".")[-1] in ("lr", "betas")]:
            del group[key]
    other, other_optimizer = trained(lr=0.25)
    before = copy.deepcopy(other_optimizer.state_dict())
    if not strict:
        set_optimizer_state_dict(other, other_optimizer, state, options=options)
        assert other_optimizer.param_groups[0]["lr"] == 0.25
        assert other_optimizer.param_groups[0]["betas"] == (0.9, 0.999)
        return
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(other, other_optimizer, state, options=options)
    assert caught.value.missing == ("param_groups.one.weight.lr", "param_groups.one.weight.betas")
    same(other_optimizer.state_dict(), before)


def test_settings_that_an_older_torch_did_not_have_are_not_missed() -> None:
    """The optimizer sets the defaults itself; a scheduler adds the keys that it needs."""
    model, optimizer = trained()
    state: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
        del state["param_groups"][0][name]
    state["param_groups"][0]["more"] = 3
    other, other_optimizer = trained()
    torch.optim.lr_scheduler.StepLR(other_optimizer, 2)
    before = copy.deepcopy(other_optimizer.param_groups[0])
    set_optimizer_state_dict(other, other_optimizer, state)
    now = other_optimizer.param_groups[0]
    assert now.pop("more") == 3
    assert now.keys() == before.keys()
    assert now["initial_lr"] == before["initial_lr"]


def test_an_optimizer_that_does_not_tell_its_entries_is_held_to_those_it_has() -> None:
    """L-BFGS steps with a closure only, and its state grows."""
    torch.manual_seed(0)  # with some initial weights the first gradient is 0, and the state final
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    early: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    optimizer.step(closure)
    later: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert early["state"]["one.weight"].keys() < later["state"]["one.weight"].keys()
    set_optimizer_state_dict(model, optimizer, later)
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, without(later, "one.weight", None, False))
    assert caught.value.missing == ("state.one.weight",)


def test_the_model_is_not_loaded_where_the_optimizers_half_does_not_fit() -> None:
    model, optimizer = trained()
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    other, other_optimizer = trained()
    before = copy.deepcopy((other.state_dict(), other_optimizer.state_dict()))
    broken = without(copy.deepcopy(optimizer_state), "one.bias", "step", False)
    with pytest.raises(CheckpointMismatchError, match=r"state\.one\.bias\.step"):
        set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=broken)
    same(other.state_dict(), before[0])
    del state["one.bias"]
    with pytest.raises(CheckpointMismatchError, match=r'"one\.bias"'):
        set_state_dict(
            other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state
        )
    same(other.state_dict(), before[0])
    same(other_optimizer.state_dict(), before[1])


# Halves that are empty, and an optimizer's own state dict.


def test_an_empty_state_dict_leaves_the_model_alone() -> None:
    model, optimizer = trained()
    other = Net()
    other_optimizer = adamw(other)
    before = copy.deepcopy(other.state_dict())
    keys = set_state_dict(
        other,
        other_optimizer,
        model_state_dict={},
        optim_state_dict=copy.deepcopy(get_optimizer_state_dict(model, optimizer)),
    )
    assert keys == ([], [])
    same(other.state_dict(), before)
    same(other_optimizer.state_dict(), optimizer.state_dict())
    assert set_model_state_dict(other, {}, options=LOOSE) == ([], [])
    same(other.state_dict(), before)


def test_an_empty_state_dict_leaves_the_optimizer_alone() -> None:
    model = Net()
    other, other_optimizer = trained()
    state = copy.deepcopy(get_model_state_dict(model))
    before = copy.deepcopy(other_optimizer.state_dict())
    set_state_dict(other, (), model_state_dict=state, optim_state_dict={})
    elsewhere = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for options in (LOOSE, elsewhere):
        set_state_dict(
            other, other_optimizer, model_state_dict=state, optim_state_dict={}, options=options
        )
        set_optimizer_state_dict(other, other_optimizer, {}, options=options)
    same(other_optimizer.state_dict(), before)
    same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, Odd])
@pytest.mark.parametrize("stepped", [False, True])
def test_an_optimizers_own_state_dict_is_taken(kind: Any, stepped: bool) -> None:
    model, optimizer = trained(kind) if stepped else (Net(), kind(Net().parameters()))
    other = Net()
    other_optimizer = kind(other.parameters(), **({} if kind is Odd else {"lr": 0.9}))
    if kind is Odd:
        other_optimizer.state["calls"] = 0
    train(other, other_optimizer)
    other.load_state_dict(model.state_dict())
    if not stepped:
        other_optimizer.state.clear()  # Its state would be lost: see below.
    set_optimizer_state_dict(other, other_optimizer, copy.deepcopy(optimizer.state_dict()))
    if stepped:
        same(other_optimizer.state_dict(), optimizer.state_dict())
        assert train(other, other_optimizer) == train(model, optimizer)
    else:
        assert not [key for key in other_optimizer.state if isinstance(key, torch.Tensor)]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, Odd])
def test_a_state_dict_without_states_never_empties_an_optimizer(kind: Any, named: bool) -> None:
    model, optimizer = trained(kind)
    fresh = kind(model.parameters(), **({} if kind is Odd else {"lr": 0.9}))
    state: Any = copy.deepcopy(fresh.state_dict())
    if named:
        groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
        state["param_groups"] = copy.deepcopy(groups)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"optimizer\.state\.clear\(\)") as caught:
        set_optimizer_state_dict(model, optimizer, state)
    names = {f"state.{name}" for name, _ in model.named_parameters()}
    assert set(caught.value.missing) == names | ({"state.calls"} if kind is Odd else set())
    same(optimizer.state_dict(), before)
    set_optimizer_state_dict(model, optimizer, state, options=LOOSE)
    same(optimizer.state_dict()["state"], before["state"])
    set_optimizer_state_dict(model, fresh, state)
    assert not fresh.state
    optimizer.state.clear()
    set_optimizer_state_dict(model, optimizer, state)
    assert not optimizer.state


def test_an_optimizers_own_state_dict_is_checked_too() -> None:
    model, optimizer = trained()
    state: Any = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]["exp_avg"]
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught.value.missing == ("state.one.bias.exp_avg",)
    with pytest.raises(CheckpointMismatchError, match=r"groups of \[4\].* hold \[2, 2, 0\]"):
        set_optimizer_state_dict(model, grouped(model, "wbe"), optimizer.state_dict())  # type: ignore[arg-type]
    two = adamw(model.one), adamw(model.two)
    with pytest.raises(CheckpointMismatchError, match="which of the 2 optimizers"):
        set_optimizer_state_dict(model, two, optimizer.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("strict", [False, True])
def test_an_own_state_dict_that_lacks_the_states_of_a_parameter(strict: bool) -> None:
    _, optimizer = trained(lr=0.5)
    state: Any = copy.deepcopy(optimizer.state_dict())
    del state["state"][2]
    other, other_optimizer = trained()
    train(other, other_optimizer, steps=3)
    before: Any = copy.deepcopy(other_optimizer.state_dict())
    options = StateDictOptions(strict=strict)
    if strict:
        with pytest.raises(CheckpointMismatchError) as caught:
            set_optimizer_state_dict(other, other_optimizer, state, options=options)
        assert caught.value.missing == ("state.two.weight",)
        same(other_optimizer.state_dict(), before)
    else:
        set_optimizer_state_dict(other, other_optimizer, state, options=options)
        now: Any = other_optimizer.state_dict()
        same(now["state"][2], before["state"][2])
        same(now["state"][1], state["state"][1])
    unstepped = Net()
    unstepped_optimizer = adamw(unstepped)
    set_optimizer_state_dict(unstepped, unstepped_optimizer, state, options=options)
    assert unstepped.two.weight not in unstepped_optimizer.state
    assert unstepped.two.bias in unstepped_optimizer.state


def test_an_own_state_dict_that_lacks_a_state_of_all_parameters() -> None:
    model, optimizer = trained(Odd)
    state: Any = copy.deepcopy(optimizer.state_dict())
    del state["state"]["calls"]
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert caught.value.missing == ("state.calls",)
    set_optimizer_state_dict(model, optimizer, state, options=LOOSE)
    assert optimizer.state["calls"] == 2  # type: ignore[index]
