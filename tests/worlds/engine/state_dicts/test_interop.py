"""torch's functions can set the states that ours get, and the other way round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as torchs

import pytest_dcp.checkpoint.state_dict as ours
from support.wrappings import WAYS, Net, adamw, close, train

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

OPTIONS: dict[str, dict[str, bool]] = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "full_flat": {"full_state_dict": True, "flatten_optimizer_state_dict": True},
    "offloaded": {"cpu_offload": True},
    "on_rank0": {"full_state_dict": True, "cpu_offload": True},
}


def options_of(module: Any, kind: str) -> Any:
    return module.StateDictOptions(**OPTIONS[kind])


@pytest.mark.parametrize(
    "way",
    [
        *("plain", "ddp", "checkpointed"),
        *("fsdp1", "fsdp1_flat", "fsdp1_hybrid", "fsdp1_below"),
        *("fsdp2", "hsdp", "fsdp2_tp"),
    ],
)
def test_both_get_equal_states_and_set_each_others(way: str) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    got: dict[str, Any] = {}
    for kind in OPTIONS:
        if kind == "on_rank0" and way.startswith("fsdp1"):
            continue  # Torch's frees the memory of a model that is on the CPU, or crashes.
        mine = ours.get_state_dict(model, optimizer, options=options_of(ours, kind))
        theirs = torchs.get_state_dict(model, optimizer, options=options_of(torchs, kind))
        close(whole(mine), whole(theirs))
        if kind in ("sharded", "flat"):
            # Copied one by one: together the copies would share objects taken from the model.
            got[kind] = copy.deepcopy(mine), copy.deepcopy(theirs)
    losses = train(model, optimizer, steps=2)
    for kind, (mine, theirs) in got.items():
        for setter, state in ((torchs, mine), (ours, theirs)):
            if (way, setter) == ("fsdp1_below", torchs):
                continue  # Torch's asks for the state of FSDP's own flat parameter.
            other = WAYS[way](Net(seed=7))
            other_optimizer = adamw(other, lr=0.7)
            setter.set_state_dict(
                other,
                other_optimizer,
                model_state_dict=state[0],
                optim_state_dict=state[1],
                options=options_of(setter, kind),
            )
            assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-4), kind


def whole(state: Any) -> Any:
    """With DTensors whole and ShardedTensors as their local parts; tuples as lists."""
    if hasattr(state, "full_tensor"):
        return state.full_tensor()
    if hasattr(state, "local_shards"):
        return [(list(s.metadata.shard_offsets), s.tensor) for s in state.local_shards()]
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    return state


def test_options_of_torch_are_taken() -> None:
    model = Net()
    options = torchs.StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    state = ours.get_optimizer_state_dict(model, adamw(model), options=options)  # type: ignore[arg-type]
    assert "state.first.up.weight.exp_avg" in state
    assert torch.equal(state["state.first.up.weight.step"], torch.tensor(0.0))  # type: ignore[arg-type]
