"""State dicts that only rank 0 has, sent to models and optimizers of every layout."""

from __future__ import annotations

import copy
import importlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_dcp._engine.state_dicts import broadcast, delivery
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
from support.wrappings import WAYS, Net, adamw, by_name, close, plain, train

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FULL = StateDictOptions(full_state_dict=True)
ON_RANK0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def bare_states(rank: int) -> tuple[Any, Any]:
    """The state of a bare model that was trained, on rank 0; nothing elsewhere."""
    model = plain(Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    return ({}, {}) if rank else (dict(model.state_dict()), by_name(model, optimizer))


@pytest.mark.parametrize(
    ("way", "flat"),
    [*((way, False) for way in WAYS), ("plain", True), ("fsdp1", True), ("fsdp2_tp", True)],
)
def test_rank_0_alone_gets_and_alone_gives(
    way: str, flat: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that there are several.
    monkeypatch.setattr(broadcast, "BUCKET_BYTES", 1)
    monkeypatch.setattr(delivery, "BUCKET_BYTES", 300)
    expected = bare_states(rank)
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    got = copy.deepcopy(get_state_dict(model, optimizer, options=ON_RANK0))
    close(got, expected)
    if flat:
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True
        )
        flattened = get_optimizer_state_dict(model, optimizer, options=options)
        got = got[0], copy.deepcopy(flattened)
    losses = train(model, optimizer, steps=2)
    for stepped in (False, True):
        other = WAYS[way](Net(seed=7))
        other_optimizer = adamw(other, lr=0.7)
        if stepped:
            train(other, other_optimizer)
        keys = set_state_dict(
            other,
            other_optimizer,
            model_state_dict=got[0],
            optim_state_dict=got[1],
            options=FROM_RANK0,
        )
        assert keys == ([], [])
        assert train(other, other_optimizer, steps=2) == pytest.approx(losses, rel=1e-4)


META_WAYS = ["plain", "fsdp2", "hsdp", "tensor_parallel", "fsdp2_tp"]


@pytest.mark.parametrize("options", [FROM_RANK0, FULL], ids=["from_rank0", "everywhere"])
@pytest.mark.parametrize("way", META_WAYS)
def test_a_meta_model_is_filled(way: str, options: StateDictOptions, world: Any) -> None:
    model = plain(Net())
    train(model, adamw(model))
    state = get_model_state_dict(model) if options is FULL or dist.get_rank() == 0 else {}
    with torch.device("meta"):
        other = Net()
    other.scratch = torch.ones(2)  # In no state dict: the model's author fills it.
    other = WAYS[way](other)  # type: ignore[assignment]
    set_model_state_dict(other, state, options=options)
    close(get_model_state_dict(other, options=FULL), dict(model.state_dict()))
    assert train(other, adamw(other), steps=2) == pytest.approx(
        train(model, adamw(model), steps=2), rel=1e-4
    )


def test_values_of_every_kind_arrive(rank: int) -> None:
    """Dtypes, a scalar, an empty tensor, one that is not contiguous, and Python values."""
    model = torch.nn.Module()
    tensors = {
        "bits": torch.tensor([True, False, True]),
        "halves": torch.arange(7.0).to(torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(12.0).reshape(3, 4).t(),
        "complex": torch.tensor([1 + 2j]),
    }
    for name, value in tensors.items():
        model.register_buffer(name, value if rank == 0 else torch.zeros_like(value))
    set_model_state_dict(model, dict(model.state_dict()) if rank == 0 else {}, options=FROM_RANK0)
    for name, value in tensors.items():
        assert torch.equal(model.get_buffer(name), value), name


class WithExtra(torch.nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"epoch": 3}, torch.tensor([1.0, 2.0]), None])
def test_extra_state_arrives(extra: Any, rank: int) -> None:
    model = WithExtra(3, 2)
    model.extra = extra if rank == 0 else "other"
    set_model_state_dict(model, dict(model.state_dict()) if rank == 0 else {}, options=FROM_RANK0)
    close(model.extra, extra)


def test_a_misfit_is_named_on_every_rank_before_anything_moves(rank: int) -> None:
    model = WAYS["fsdp2"](Net(seed=7))
    before = copy.deepcopy(get_model_state_dict(model, options=FULL))
    state, _ = bare_states(rank)
    if rank == 0:
        state["strange"] = state.pop("scale")
        state["first.up.bias"] = torch.ones(3)
    with pytest.raises(CheckpointMismatchError) as caught:
        set_model_state_dict(model, state, options=FROM_RANK0)
    assert caught.value.missing == ("scale",)
    assert caught.value.unexpected == ("strange",)
    assert caught.value.mismatched == ("first.up.bias",)
    close(get_model_state_dict(model, options=FULL), before)
    if rank == 0:
        del state["first.up.bias"]
    loose = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    keys = set_model_state_dict(model, state, options=loose)
    assert sorted(keys.missing_keys) == ["first.up.bias", "scale"]
    assert keys.unexpected_keys == ["strange"]
    after = get_model_state_dict(model, options=FULL)
    close(after["first.up.bias"], before["first.up.bias"])
    assert not torch.equal(after["first.up.weight"], before["first.up.weight"])  # type: ignore[arg-type]


def test_an_optimizer_that_does_not_fit_is_named_on_every_rank(rank: int) -> None:
    model = WAYS["fsdp2"](Net())
    optimizer = adamw(model)
    _, state = bare_states(rank)
    if rank == 0:
        del state["param_groups"][0]["params"][0]
        state["state"].pop("first.up.weight")
        state["state"]["module.bias"]["exp_avg"] = torch.ones(9)
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state, options=FROM_RANK0)
    assert caught.value.missing == ("first.up.weight",)
    assert caught.value.mismatched == ("state.module.bias.exp_avg",)
    assert not optimizer.state
    with pytest.raises(CheckpointMismatchError, match=r"Missing key\(s\)") as caught:
        set_optimizer_state_dict(model, optimizer, {}, options=FROM_RANK0)
    assert len(caught.value.missing) == 8


def test_parts_on_rank_0_are_refused_on_every_rank(rank: int) -> None:
    model = WAYS["fsdp2"](Net())
    with pytest.raises(ValueError, match=r"must hold whole tensors.*full_state_dict=True"):
        set_model_state_dict(model, get_model_state_dict(model), options=FROM_RANK0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made inside and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.is_meta or key in self.known or _shares(key, args):
                continue
            self.known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, key, storage.nbytes())
            self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _shares(key: int, args: Any) -> bool:
    return any(t.untyped_storage()._cdata == key for t in _tensors(args))


def deep(device: str) -> torch.nn.Module:
    with torch.device(device):
        layers = [torch.nn.Linear(256, 256, bias=False) for _ in range(12)]
        model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 1024, bias=False))
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory_is_bounded_by_the_largest_tensor_and_the_shards(device: str, rank: int) -> None:
    largest = 1024 * 256 * 4
    whole_bytes = 12 * 256 * 256 * 4 + largest
    assert largest >= broadcast.BUCKET_BYTES
    state = get_model_state_dict(deep("cpu"), options=ON_RANK0)
    model = deep(device)
    with LiveBytes() as memory:
        set_model_state_dict(model, state, options=FROM_RANK0)
    # The model's own shards where it had none; the largest tensor; and the odd small one.
    shards = whole_bytes // 4 if device == "meta" else 0
    assert largest <= memory.peak <= shards + largest + (64 << 10)
    optimizer = adamw(model)
    train_once(model, optimizer)
    optimizer_state = get_optimizer_state_dict(model, optimizer, options=ON_RANK0)
    with LiveBytes() as memory:
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=FROM_RANK0)
    assert largest <= memory.peak <= largest + (64 << 10)
    fresh = adamw(model)
    with LiveBytes() as memory:
        set_optimizer_state_dict(model, fresh, optimizer_state, options=FROM_RANK0)
    assert largest <= memory.peak <= 2 * whole_bytes // 4 + largest + (64 << 10)


def train_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("way", ["plain", "fsdp1", "fsdp2"])
def test_rank_0_alone_says_that_a_half_is_left_alone(way: str, rank: int) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=ON_RANK0))
    other = WAYS[way](Net(seed=7))
    other_optimizer = adamw(other)
    before = copy.deepcopy(get_model_state_dict(other, options=FULL))
    keys = set_state_dict(
        other,
        other_optimizer,
        model_state_dict={},
        optim_state_dict=optimizer_state,
        options=FROM_RANK0,
    )
    assert keys == ([], [])
    close(get_model_state_dict(other, options=FULL), before)
    found: Any = get_optimizer_state_dict(other, other_optimizer, options=FULL)["state"]
    assert {float(of["step"]) for of in found.values()} == {2.0}
    loose = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    assert set_model_state_dict(other, {}, options=loose) == ([], [])
    set_optimizer_state_dict(other, other_optimizer, {}, options=loose)
    with pytest.raises(CheckpointMismatchError):
        set_optimizer_state_dict(other, other_optimizer, {}, options=FROM_RANK0)
    set_model_state_dict(other, state, options=FROM_RANK0)
    assert train(other, other_optimizer) == pytest.approx(train(model, optimizer), rel=1e-4)


@pytest.mark.parametrize("way", ["plain", "fsdp1", "fsdp2"])
def test_an_entry_that_rank_0_lacks_is_named_on_every_rank(way: str, rank: int) -> None:
    model = WAYS[way](Net())
    optimizer = adamw(model)
    train(model, optimizer, steps=2)
    state: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=ON_RANK0))
    if rank == 0:
        del state["state"]["first.up.weight"], state["state"]["first.up.bias"]["exp_avg"]
    before = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    with pytest.raises(CheckpointMismatchError) as caught:
        set_optimizer_state_dict(model, optimizer, state, options=FROM_RANK0)
    assert set(caught.value.missing) == {"state.first.up.weight", "state.first.up.bias.exp_avg"}
    close(get_optimizer_state_dict(model, optimizer, options=FULL), before)


@pytest.mark.parametrize("way", ["plain", "fsdp2"])
def test_rank_0_may_give_an_optimizers_own_state_dict(way: str, rank: int) -> None:
    source = plain(Net())
    source_optimizer = adamw(source)
    train(source, source_optimizer, steps=2)
    model = WAYS[way](Net(seed=7))
    optimizer = adamw(model)
    given: Any = ({}, {})
    if rank == 0:
        given = dict(source.state_dict()), copy.deepcopy(source_optimizer.state_dict())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=given[0],
        optim_state_dict=given[1],
        options=FROM_RANK0,
    )
    losses = train(source, source_optimizer, steps=2)
    assert train(model, optimizer, steps=2) == pytest.approx(losses, rel=1e-4)


BROKEN = {
    "the model's names": ("model._Target.of", 0),
    "the comparison of the model": ("model._Target.compare", 0),
    "the model's first tensor": ("model._fill_or_make", 0),
    "the model's third tensor": ("model._fill_or_make", 2),
    "the optimizers' names": ("optimizer_loading._targets", 0),
    "the comparison of the optimizers": ("optimizer_loading._compare", 0),
    "what is announced of the optimizers": ("optimizer_loading._split_into_entries", 0),
    "a state's memory": ("optimizer_target.Target.fill", 1),
    "the message's memory": ("broadcast._choose_broadcast_device", 0),
    "the sending of the second tensor": ("broadcast._copy", 1),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_failure_of_one_rank_is_raised_on_all(
    broken: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "BUCKET_BYTES", 300)
    given = bare_states(rank)
    model = plain(Net(seed=7))
    optimizer = adamw(model)
    where, after = BROKEN[broken]
    bad = 0 if "sending" in broken or "announced" in broken else 2
    if rank == bad:
        module, _, name = where.partition(".")
        owner: Any = importlib.import_module(f"pytest_dcp._engine.state_dicts.{module}")
        *classes, name = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        whole, calls = getattr(owner, name), itertools.count()

        def breaks(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == after:
                raise MemoryError("no room here")
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, staticmethod(breaks) if name == "of" else breaks)
    with pytest.raises(MemoryError if rank == bad else CheckpointError) as caught:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=given[0],
            optim_state_dict=given[1],
            options=FROM_RANK0,
        )
    assert ("no room here" if rank == bad else f"rank {bad}: MemoryError: no room here") in str(
        caught.value
    )
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 4
