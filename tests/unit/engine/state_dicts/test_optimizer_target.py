"""The state dict that an optimizer's own `load_state_dict` is given."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch

from pytest_dcp.checkpoint.state_dict import get_state_dict, set_state_dict

LAYERS = 50


class Counted(int):
    """A number that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return int(self) == other

    __hash__ = int.__hash__


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the states of both into them; the state dict that the optimizer was given."""
    received: list[dict[str, Any]] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, given: received.append(given))
    own, of_optimizer = get_state_dict(model, optimizer)
    set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=of_optimizer)
    return received[-1]


def test_its_parameters_are_found_without_a_search() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    (group,) = load(model, optimizer)["param_groups"]
    assert group["params"] == list(range(2 * LAYERS))
    Counted.comparisons = 0
    # Torch looks each parameter up once for each tensor of its state.
    assert Counted(2 * LAYERS - 1) in group["params"]
    assert Counted(2 * LAYERS) not in group["params"]
    assert Counted.comparisons <= 4


def test_a_copy_of_its_parameters_is_a_plain_list() -> None:
    model = torch.nn.Linear(2, 2)
    (group,) = load(model, torch.optim.SGD(model.parameters(), momentum=0.9))["param_groups"]
    for copied in (copy.deepcopy(group["params"]), pickle.loads(pickle.dumps(group["params"]))):
        assert type(copied) is list
        assert copied == [0, 1]


def test_each_group_has_its_own_parameters() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    )
    first, second = load(model, optimizer)["param_groups"]
    assert (first["params"], second["params"]) == ([0, 1], [2, 3])
    assert 2 not in first["params"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
