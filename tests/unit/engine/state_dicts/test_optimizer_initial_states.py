"""The states that optimizers begin with, found without a step of theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pytest_dcp._engine.state_dicts import optimizer_initial_states
from pytest_dcp._engine.state_dicts.optimizer_initial_states import initial_states
from pytest_dcp.errors import CheckpointError
from support.opaque_tensors import Scaled

ALIKE: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.25), "foreach": False}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.3}),
    (torch.optim.ASGD, {"t0": 0.0}),
    (torch.optim.Adafactor, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
]


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) - 2.5)


@pytest.mark.parametrize(
    ("kind", "more"), ALIKE, ids=[f"{kind.__name__}-{'-'.join(more)}" for kind, more in ALIKE]
)
def test_training_from_an_initial_state_is_training_from_none(kind: Any, more: Any) -> None:
    one, other = parameter(), parameter()
    bare, primed = kind([one], **more), kind([other], **more)
    (state,) = initial_states(primed, primed.param_groups[0], [other])
    groups = copy.deepcopy(primed.state_dict()["param_groups"])
    primed.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
    for step in range(3):
        for p, optimizer in ((one, bare), (other, primed)):
            p.grad = torch.full_like(p, 0.5 - step)
            optimizer.step()
    assert torch.equal(one, other)
    assert bare.state_dict()["state"].keys() == primed.state_dict()["state"].keys()


def test_neither_parameters_nor_gradients_nor_the_optimizer_change() -> None:
    p = parameter()
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stepped: list[Any] = []
    optimizer.register_step_pre_hook(lambda *args: stepped.append(args))
    before = p.detach().clone()
    (state,) = initial_states(optimizer, optimizer.param_groups[0], [p])
    assert torch.equal(p, before)
    assert torch.equal(p.grad, torch.ones_like(p))
    assert not optimizer.state
    assert not stepped
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert scheduler.last_epoch == 0
    assert state["step"] == 0


class Hoarder(torch.optim.Optimizer):
    """Keeps its parameters where no group shows them, and states of every kind."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1.0})
        self.hoard = list(params)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(count=0, name="new", nested={"m": torch.zeros_like(p)})
                    state.setdefault("history", [])
                state["count"] += 1
                state["name"] = "used"
                state["history"].append(state["count"])
        for p in self.hoard:
            if p.grad is not None:
                p.data.sub_(1)


def test_an_optimizer_of_ones_own_says_its_first_values() -> None:
    p = parameter()
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer = Hoarder([p])
    (state,) = initial_states(optimizer, optimizer.param_groups[0], [p])
    assert torch.equal(p, before)
    assert (state["count"], state["name"], state["history"]) == (0, "new", [])
    assert torch.equal(state["nested"]["m"], torch.zeros(2, 3))


class Uncloneable(Scaled):
    """As torchao's states of 8 bits: they can be made and filled, but not cloned."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.clone:
            raise NotImplementedError(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Quantising(Hoarder):
    """Keeps a wrapper, and changes its inner tensors in its first step."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            made = Uncloneable(torch.zeros(p.shape, dtype=torch.int8), torch.ones(len(p)))
            self.state[p]["average"] = made
            made.values.fill_(7)


def test_a_state_that_cannot_be_cloned_is_copied_by_its_inner_tensors() -> None:
    p = parameter()
    optimizer = Quantising([p])
    (state,) = initial_states(optimizer, optimizer.param_groups[0], [p])
    average = state["average"]
    assert type(average) is Uncloneable
    assert average.values.tolist() == [[0] * 3] * 2  # before the step changed it
    assert average.block == 32


def test_a_meta_parameter_has_meta_states() -> None:
    p = torch.nn.Parameter(torch.empty(2, 3, device="meta"))
    optimizer = torch.optim.AdamW([p])
    (state,) = initial_states(optimizer, optimizer.param_groups[0], [p])
    assert state["exp_avg"].is_meta
    assert state["step"] == 0


def test_parameters_are_stood_in_for_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_initial_states, "BATCH_BYTES", 100)
    parameters = [torch.nn.Parameter(torch.empty(n)) for n in (5, 20, 1, 200, 3, 4)]
    assert [
        [p.numel() for p in batch] for batch in optimizer_initial_states._batches(parameters)
    ] == [
        [5, 20],
        [1],
        [200],
        [3, 4],
    ]
    optimizer = torch.optim.AdamW(parameters)
    states = initial_states(optimizer, optimizer.param_groups[0], parameters)
    assert [state["exp_avg"].numel() for state in states] == [5, 20, 1, 200, 3, 4]


def test_an_optimizer_that_cannot_be_stepped_for_its_state_says_what_to_do() -> None:
    p = parameter()
    optimizer = torch.optim.LBFGS([p])
    with pytest.raises(CheckpointError, match=r"LBFGS has not been stepped.*step it once"):
        initial_states(optimizer, optimizer.param_groups[0], [p])
