"""Hard cases of sharding: groups, frozen and unused parts, odd states, errors, other sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

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
from support.wrappings import WAYS, Net, adamw, close, plain, train

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FULL = StateDictOptions(full_state_dict=True)
SHARDING = ["ddp", "fsdp1", "fsdp2", "fsdp2_tp"]


def half_frozen(model: torch.nn.Module) -> torch.nn.Module:
    model.second.requires_grad_(False)
    return model


@pytest.mark.parametrize("way", SHARDING)
def test_frozen_parameters_go_round(way: str) -> None:
    """Into a model that is not frozen only where their states may be missing, and begin anew."""
    bare = half_frozen(Net())
    bare_optimizer = adamw(bare)
    train(bare, bare_optimizer, steps=2)
    model = WAYS[way](half_frozen(Net()))
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    states = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    close(states[0], dict(bare.state_dict()))
    assert sorted(states[1]["state"]) == [
        f"{name}.{kind}"
        for name, kind in (
            ("first.down", "weight"),
            ("first.up", "bias"),
            ("first.up", "weight"),
            ("module", "bias"),
            ("module", "weight"),
        )
    ]
    other = WAYS[way](half_frozen(Net(seed=7)))
    other_optimizer = adamw(other)
    set_state_dict(other, other_optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    losses = train(bare, bare_optimizer, steps=2)
    assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-4)
    thawed = WAYS[way](Net(seed=7))
    thawed_optimizer = adamw(thawed)
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(thawed, thawed_optimizer, copy.deepcopy(states[1]))
    assert set(caught.value.missing) == {
        f"state.{name}" for name, _ in bare.named_parameters() if name.startswith("second")
    }
    loose = StateDictOptions(strict=False)
    set_optimizer_state_dict(thawed, thawed_optimizer, copy.deepcopy(states[1]), options=loose)
    assert train(thawed, thawed_optimizer)


@pytest.mark.parametrize("way", SHARDING)
def test_only_trainable_parameters_are_asked_for(way: str) -> None:
    options = StateDictOptions(ignore_frozen_params=True, full_state_dict=True)
    model = WAYS[way](half_frozen(Net()))
    optimizer = adamw(model)
    train(model, optimizer)
    states = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    assert not [name for name in (*states[0], *states[1]["state"]) if name.startswith("second")]
    other = WAYS[way](half_frozen(Net(seed=5)))
    other_optimizer = adamw(other)
    keys = set_state_dict(
        other,
        other_optimizer,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=options,
    )
    assert keys == ([], [])
    assert train(other, other_optimizer) == pytest.approx(train(model, optimizer), rel=1e-4)


@pytest.mark.parametrize("way", SHARDING)
def test_a_never_stepped_optimizer_is_left_as_it_is(way: str) -> None:
    bare, model = plain(Net()), WAYS[way](Net())
    optimizer = adamw(model)
    states = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    assert {float(of["step"]) for of in states.values()} == {0.0}  # type: ignore[union-attr,index,call-overload,arg-type]
    assert not optimizer.state
    expected = train(bare, adamw(bare), steps=2)
    assert train(model, optimizer, steps=2) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("way", SHARDING)
def test_groups_in_another_order_keep_their_settings(way: str) -> None:
    def grouped(model: torch.nn.Module, order: tuple[int, ...]) -> torch.optim.Optimizer:
        weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": 0.1},
            {"params": biases, "lr": 0.2, "weight_decay": 0.0},
            {"params": [], "lr": 0.3},
        ]
        return torch.optim.AdamW([groups[at] for at in order], lr=9.0)

    model, other = WAYS[way](Net()), WAYS[way](Net(seed=7))
    optimizer, other_optimizer = grouped(model, (2, 0, 1)), grouped(other, (1, 2, 0))
    train(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= 2
    states = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    set_state_dict(other, other_optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    assert [group["lr"] for group in other_optimizer.param_groups] == [0.4, 0.6, 0.2]
    assert train(other, other_optimizer, steps=2) == pytest.approx(
        train(model, optimizer, steps=2), rel=1e-4
    )


class Rows(torch.optim.Optimizer):
    """Keeps one number for each row of a matrix: a state that is not shaped as its parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                squares = p.grad.reshape(len(p), -1).square().sum(1)
                self.state[p]["rows"] = (
                    self.state[p].get("rows", torch.zeros_like(squares)) + squares
                )
                scale = (0.1 + self.state[p]["rows"]).rsqrt()
                p -= group["lr"] * p.grad * scale.reshape(-1, *[1] * (p.ndim - 1))


@pytest.mark.parametrize("way", ["plain", "ddp", "fsdp2", "hsdp"])
def test_states_that_are_not_shaped_as_their_parameter_go_round(way: str) -> None:
    model = WAYS[way](Net())
    optimizer = Rows(model.parameters())
    train(model, optimizer, steps=2)
    states = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    losses = train(model, optimizer, steps=2)
    for other_way in ("plain", "fsdp2", "hsdp"):
        other = WAYS[other_way](Net(seed=7))
        other_optimizer = Rows(other.parameters())
        set_state_dict(
            other,
            other_optimizer,
            model_state_dict=states[0],
            optim_state_dict=copy.deepcopy(states[1]),
        )
        rows = other_optimizer.state[next(other.parameters())]["rows"]
        assert isinstance(rows, DTensor) == (other_way != "plain")
        assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-3)
    wrong: Any = copy.deepcopy(states[1])
    wrong["state"]["first.up.weight"]["rows"] = torch.ones(3)
    with pytest.raises(CheckpointMismatchError, match=r"expected size \(8,\), got \(3,\)"):
        set_optimizer_state_dict(model, optimizer, wrong)


@pytest.mark.parametrize("way", [*SHARDING, "hsdp"])
def test_everything_that_does_not_fit_is_named_in_every_way(way: str) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    broken: Any = {**state, "strange": torch.ones(1), "stranger": 3}
    del broken["first.up.bias"], broken["scale"]
    with pytest.raises(CheckpointMismatchError) as caught:
        set_model_state_dict(model, broken)
    assert set(caught.value.missing) == {"first.up.bias", "scale"}
    assert set(caught.value.unexpected) == {"strange", "stranger"}
    loose = StateDictOptions(strict=False)
    keys = set_model_state_dict(model, broken, options=loose)
    assert set(keys.missing_keys) == {"first.up.bias", "scale"}
    assert set(keys.unexpected_keys) == {"strange", "stranger"}
    broken["scale"] = torch.ones(17)
    with pytest.raises(
        CheckpointMismatchError, match=r"mismatch for scale: .*Size\(\[17\]\) from .*Size\(\[3\]\)"
    ):
        set_model_state_dict(model, broken, options=loose)
    groups: Any = optimizer_state["param_groups"]
    groups[0]["params"].remove("module.weight")
    groups[0]["params"].append("strange")
    del optimizer_state["state"]["module.weight"]  # type: ignore[union-attr,arg-type,call-overload]
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, optimizer_state)
    assert caught.value.missing == ("module.weight",)
    assert caught.value.unexpected == ("strange",)
    steps = train(model, optimizer)
    assert steps
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=loose)
    found: Any = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    assert float(found["module.weight"]["step"]) == 2
    assert float(found["first.up.weight"]["step"]) == 1


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("way", ["ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2_tp"])
def test_missing_entries_are_named_on_every_rank_in_every_way(
    way: str, full: bool, flat: bool
) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flat)
    state: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if flat:
        gone = [key for key in state if key.startswith("state.first.up.weight.")]
        for key in [*gone, "state.first.up.bias.exp_avg"]:
            del state[key]
    else:
        del state["state"]["first.up.weight"], state["state"]["first.up.bias"]["exp_avg"]
    other = WAYS[way](Net(seed=7))
    other_optimizer = adamw(other)
    train(other, other_optimizer)
    before = copy.deepcopy(get_optimizer_state_dict(other, other_optimizer, options=FULL))
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(other, other_optimizer, state)
    missing = {"state.first.up.weight", "state.first.up.bias.exp_avg"}
    assert set(caught.value.missing) == missing
    assert caught.value.unexpected == ()
    close(get_optimizer_state_dict(other, other_optimizer, options=FULL), before)
    loose = StateDictOptions(strict=False)
    set_optimizer_state_dict(other, other_optimizer, state, options=loose)
    found: Any = get_optimizer_state_dict(other, other_optimizer, options=FULL)["state"]
    kept: Any = before["state"]
    close(found["first.up.weight"], kept["first.up.weight"])
    close(found["first.up.bias"]["exp_avg"], kept["first.up.bias"]["exp_avg"])
    assert float(found["first.up.bias"]["step"]) == 2
    assert float(found["module.weight"]["step"]) == 2


@pytest.mark.parametrize("way", ["plain", "ddp", "fsdp1", "fsdp2", "fsdp2_tp"])
def test_an_optimizers_own_state_dict_is_taken_in_every_way(way: str) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    other = WAYS[way](Net(seed=7))
    other_optimizer = adamw(other, lr=0.9)
    set_model_state_dict(other, get_model_state_dict(model))
    set_optimizer_state_dict(other, other_optimizer, copy.deepcopy(optimizer.state_dict()))
    losses = train(model, optimizer, steps=2)
    assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("way", ["plain", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("empty", [False, True])
def test_an_own_state_dict_never_takes_states_away(way: str, empty: bool) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    state: Any = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, steps=2)
    if not empty:
        state = copy.deepcopy(optimizer.state_dict())
        state["state"].pop(0, None)  # FSDP1 has it where a part of the parameter is.
    before = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state)
    assert ("optimizer.state.clear()" in str(caught.value)) == empty
    assert (len(caught.value.missing) == 8) == empty
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    close(get_optimizer_state_dict(model, optimizer, options=FULL), before)
    optimizer.state.clear()
    if way == "fsdp1" and not empty:  # Its parameters lie together, and so are stepped together.
        with pytest.raises(CheckpointMismatchError, match=r"first\.up\.weight is not in"):
            set_optimizer_state_dict(model, optimizer, state)
    else:
        set_optimizer_state_dict(model, optimizer, state)
        assert len(optimizer.state) == (0 if empty else len(state["state"]))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("entry", [None, "exp_avg"])
def test_an_own_state_dict_that_lacks_one_ranks_part_of_a_state(
    rank: int, strict: bool, entry: str | None
) -> None:
    model = WAYS["fsdp1"](Net())
    optimizer = adamw(model)
    train(model, optimizer)
    state: Any = copy.deepcopy(optimizer.state_dict())
    if rank == 2:  # Ranks 1 and 2 have elements of the second parameter.
        del (state["state"] if entry is None else state["state"][1])[entry or 1]
    train(model, optimizer)
    before = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    what = "'exp_avg', 'exp_avg_sq', 'step'" if entry is None else "'exp_avg'"
    with pytest.raises(
        CheckpointMismatchError, match=rf"'state\.first\.up\.bias': {what} missing on rank 2"
    ):
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=strict))
    close(get_optimizer_state_dict(model, optimizer, options=FULL), before)


def test_an_own_state_dict_within_fsdp1_cannot_be_broadcast(rank: int) -> None:
    model = WAYS["fsdp1"](Net())
    optimizer = adamw(model)
    train(model, optimizer)
    state: Any = optimizer.state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with pytest.raises(CheckpointError, match="broadcast_from_rank0 cannot give the others"):
        set_optimizer_state_dict(model, optimizer, state, options=options)


def test_parameters_that_are_whole_after_a_forward_are_found_sharded() -> None:
    model = WAYS["fsdp2"](Net())
    optimizer = adamw(model)
    with torch.no_grad():
        model(torch.ones(1, 5))
    state, optimizer_state = get_state_dict(model, optimizer)
    assert all(isinstance(state[n], DTensor) for n in ("module.weight", "first.up.weight"))
    assert len(optimizer_state["state"]) == 8


def test_a_dtensor_of_another_layout_is_laid_out_anew() -> None:
    mesh = init_device_mesh("cpu", (4,))
    source = {name: value.clone() for name, value in Net().state_dict().items()}
    given = {
        name: DTensor.from_local(value, mesh, [Replicate()]).redistribute(placements=[Shard(0)])
        for name, value in source.items()
    }
    for way in ("plain", "ddp", "fsdp2", "fsdp2_tp", "fsdp1"):
        model = WAYS[way](Net(seed=7))
        set_model_state_dict(model, given)  # type: ignore[arg-type]
        close(get_model_state_dict(model, options=FULL), source)


def test_a_dimension_other_than_the_first_may_be_sharded() -> None:
    source = torch.nn.Linear(8, 3).state_dict()
    model = torch.nn.Linear(8, 3)
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)
    set_model_state_dict(model, dict(source))
    assert model.weight.to_local().shape == (3, 2)  # type: ignore[attr-defined]  # a DTensor
    close(get_model_state_dict(model, options=FULL), dict(source))
