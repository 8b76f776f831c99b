"""Contents of a state dict: every sort of tensor, values, containers, objects with a state.

Saved by two ranks, loaded in place, and compared with a load by torch's engine.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import pytest_dcp.checkpoint as dcp
from support.states import blank, numbered, same, spread, torch_dcp, without_warnings

pytestmark = pytest.mark.world_size(2, isolation="module")

DTYPES = [
    value
    for name, value in sorted(vars(torch).items())
    if isinstance(value, torch.dtype)
    and name == str(value).removeprefix("torch.")
    and not name.startswith(("q", "bits"))
    and value.itemsize
]
WHOLE_BYTE = [
    d
    for d in DTYPES
    if str(d).removeprefix("torch.") not in [f"{u}int{n}" for u in ("", "u") for n in range(1, 8)]
]


def of_dtype(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of the dtype made of numbered bytes (0 and 1 for bool)."""
    count = int(torch.tensor(shape).prod()) * dtype.itemsize
    raw = torch.arange(count, dtype=torch.int64) * 7 % (2 if dtype == torch.bool else 251)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def ours_and_torchs(state: dict[str, Any], folder: Path) -> None:
    """Save with ours, load with both; save with torch's, load with ours; all give the state."""
    dcp.save(state, checkpoint_id=folder / "ours")
    for engine in (dcp, torch_dcp):
        target = blank(state)
        engine.load(target, checkpoint_id=folder / "ours")
        assert same(target, state), engine.__name__
    torch_dcp.save(state, checkpoint_id=folder / "torchs")
    target = blank(state)
    dcp.load(target, checkpoint_id=folder / "torchs")
    assert same(target, state)


def test_every_dtype_survives_bit_for_bit(checkpoint_dir: Path) -> None:
    assert len(WHOLE_BYTE) >= 20
    state = {str(dtype): of_dtype(dtype, 3, 4) for dtype in WHOLE_BYTE}
    with without_warnings("ComplexHalf support is experimental"):
        ours_and_torchs(state, checkpoint_dir)


def test_every_dtype_can_be_sharded(checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
    def sharded(dtype: torch.dtype) -> DTensor:
        mine = of_dtype(dtype, 4, 4).chunk(2)[dist.get_rank()].clone()
        return DTensor.from_local(
            mine, device_mesh, [Shard(0)], shape=torch.Size([4, 4]), stride=(4, 1)
        )

    with without_warnings("ComplexHalf support is experimental"):
        dcp.save({str(d): sharded(d) for d in WHOLE_BYTE}, checkpoint_id=checkpoint_dir)
        whole = {str(d): blank(of_dtype(d, 4, 4)) for d in WHOLE_BYTE}
        dcp.load(whole, checkpoint_id=checkpoint_dir)
        assert same(whole, {str(d): of_dtype(d, 4, 4) for d in WHOLE_BYTE})


def test_nan_infinity_and_negative_zero_survive(checkpoint_dir: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324])
    ours_and_torchs({"odd": odd, "double": odd.double()}, checkpoint_dir)


def test_tensors_of_any_shape_and_stride_survive(checkpoint_dir: Path) -> None:
    base = numbered(4, 6)
    state = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0),
        "empty_2d": torch.empty(3, 0, 2),
        "one": torch.tensor([7]),
        "transposed": base.t(),
        "sliced": base[1:3, ::2],
        "column": base[:, 2],
        "expanded": torch.tensor([[3.0]]).expand(2, 3),
        "channels_last": numbered(1, 2, 3, 2).to(memory_format=torch.channels_last),
        "five": numbered(1, 2, 1, 3, 2),
        "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    }
    dcp.save(state, checkpoint_id=checkpoint_dir)
    target = {key: torch.full(value.shape, -1).to(value.dtype) for key, value in state.items()}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    for key, value in state.items():
        assert torch.equal(target[key], value.resolve_conj().resolve_neg()), key


def test_a_target_of_any_stride_is_filled_in_place(checkpoint_dir: Path) -> None:
    full = numbered(4, 6)
    dcp.save({"w": full, "v": full, "u": full}, checkpoint_id=checkpoint_dir)
    base, wide = torch.zeros(6, 4), torch.zeros(8, 12)
    shifted = torch.zeros(100)
    target = {
        "w": base.t(),
        "v": wide[::2, ::2],
        "u": shifted[7:31].view(4, 6),
    }
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert torch.equal(base, full.t())
    assert torch.equal(wide[::2, ::2], full)
    assert wide[1::2].abs().sum() == 0
    assert wide[:, 1::2].abs().sum() == 0
    assert torch.equal(shifted[7:31].view(4, 6), full)
    assert shifted[:7].abs().sum() == shifted[31:].abs().sum() == 0


def test_a_load_fills_the_tensors_that_are_there(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    full = numbered(5, 3)
    inner = {"plain": full.clone(), "sharded": spread(full, device_mesh, Shard(0))}
    state: dict[str, Any] = {"model": inner, "list": [full.clone(), {"deep": full.clone()}]}
    dcp.save(state, checkpoint_id=checkpoint_dir)
    target = blank(state)
    objects = (target["model"], target["list"], target["list"][1])
    tensors = (
        target["model"]["plain"],
        target["model"]["sharded"],
        target["list"][0],
        target["list"][1]["deep"],
    )
    places = [(t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in tensors]
    assert dcp.load(target, checkpoint_id=checkpoint_dir) is not target
    assert same(target, state)
    assert target["model"] is objects[0]
    assert target["list"] is objects[1]
    assert target["list"][1] is objects[2]
    found = (
        target["model"]["plain"],
        target["model"]["sharded"],
        target["list"][0],
        target["list"][1]["deep"],
    )
    assert all(a is b for a, b in zip(found, tensors, strict=True))
    assert [(t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in found] == places


def test_values_are_replaced(checkpoint_dir: Path) -> None:
    state: dict[str, Any] = {
        "int": 3,
        "none": None,
        "text": "a\nbä",
        "bytes": b"\0\xff",
        "float": 0.1,
        "bool": True,
        "tuple": (1, "two", None),
        "list": [1, [2, 3]],
        "set": {1, 2},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "empty_list": [],
        "ordered": {"b": 1, "a": 2},
    }
    dcp.save(state, checkpoint_id=checkpoint_dir)
    for engine in (dcp, torch_dcp):
        target: dict[str, Any] = dict.fromkeys(state, 0)
        target["ordered"] = {"b": 0, "a": 0}
        engine.load(target, checkpoint_id=checkpoint_dir)
        assert same(target, state), engine.__name__


def test_values_that_torch_wrote_are_read(checkpoint_dir: Path) -> None:
    state: dict[str, Any] = {
        "counts": collections.OrderedDict(a=1, b=(2, [3, {"x": None}])),
        "rng": torch.get_rng_state(),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        "tensors in a tuple": (torch.ones(2), 1),
    }
    torch_dcp.save(state, checkpoint_id=checkpoint_dir)
    target = blank(state)
    target["counts"] = {"a": None, "b": None}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["counts"] == {"a": 1, "b": (2, [3, {"x": None}])}
    assert torch.equal(target["rng"], state["rng"])
    assert target["groups"] == state["groups"]
    assert torch.equal(target["tensors in a tuple"][0], torch.ones(2))


class Counter:
    """An object with a state."""

    def __init__(self, steps: int, weight: torch.Tensor) -> None:
        self.steps, self.weight = steps, weight
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads += 1
        self.steps = state["steps"]
        assert state["weight"] is self.weight


def test_objects_with_a_state_are_saved_and_loaded_by_their_methods(checkpoint_dir: Path) -> None:
    dcp.save({"counter": Counter(5, numbered(3)), "x": 1}, checkpoint_id=checkpoint_dir)
    for engine in (dcp, torch_dcp):
        counter = Counter(0, torch.zeros(3))
        state: dict[str, Any] = {"counter": counter, "x": 0}
        engine.load(state, checkpoint_id=checkpoint_dir)
        assert state == {"counter": counter, "x": 1}
        assert (counter.steps, counter.loads) == (5, 1)
        assert torch.equal(counter.weight, numbered(3))


def test_a_module_and_its_optimizer_are_states(checkpoint_dir: Path) -> None:
    def made(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 10)
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made(1)
    dcp.save({"model": model, "optim": optimizer}, checkpoint_id=checkpoint_dir)
    other, other_optimizer = made(2)
    dcp.load({"model": other, "optim": other_optimizer}, checkpoint_id=checkpoint_dir)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


def test_parameters_and_buffers_are_filled(checkpoint_dir: Path) -> None:
    weight = torch.nn.Parameter(numbered(2, 3))
    ours_state = {"w": weight, "b": torch.nn.Buffer(numbered(2))}
    dcp.save(ours_state, checkpoint_id=checkpoint_dir)
    target = {"w": torch.nn.Parameter(torch.zeros(2, 3)), "b": torch.nn.Buffer(torch.zeros(2))}
    parameter = target["w"]
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["w"] is parameter
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert torch.equal(parameter, weight)
    assert torch.equal(target["b"], numbered(2))


def test_keys_that_are_no_strings_are_kept(checkpoint_dir: Path) -> None:
    state: dict[str, Any] = {"state": {0: {"step": torch.tensor(1.0)}, 1: {"n": 3}, -1: "x"}}
    dcp.save(state, checkpoint_id=checkpoint_dir / "ours")
    torch_dcp.save(state, checkpoint_id=checkpoint_dir / "torchs")
    for folder in ("ours", "torchs"):
        target: dict[str, Any] = {"state": {0: {"step": torch.tensor(0.0)}, 1: {"n": 0}, -1: ""}}
        dcp.load(target, checkpoint_id=checkpoint_dir / folder)
        assert same(target, state), folder
    # torch's engine puts such values under the keys' texts; tensors it fills in place.
    torch_dcp.load(target := blank(state), checkpoint_id=checkpoint_dir / "ours")
    assert same(target["state"][0], state["state"][0])


def test_names_of_any_characters_survive(checkpoint_dir: Path) -> None:
    names = ["a.b", "a/b", "../up", "ä 漢", "with\nline", '"quoted"', "", " ", "a..b", "\0"]
    state: dict[str, Any] = {name: numbered(2, start=n) for n, name in enumerate(names)}
    state |= {f"value {name}": name for name in names}
    ours_and_torchs(state, checkpoint_dir)


def test_two_paths_with_one_name_are_refused(checkpoint_dir: Path) -> None:
    with pytest.raises(CheckpointException, match=r"duplicated flatten key 'a\.b'"):
        dcp.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, checkpoint_id=checkpoint_dir)


def test_ranks_may_order_keys_differently(checkpoint_dir: Path, rank: int) -> None:
    state = {name: numbered(2, start=n) for n, name in enumerate("abcdef")}
    mine = {name: state[name] for name in sorted(state, reverse=bool(rank))}
    dcp.save(mine, checkpoint_id=checkpoint_dir)
    target = blank({name: state[name] for name in sorted(state, reverse=not rank)})
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert all(same(target[name], state[name]) for name in state)


def test_a_rank_may_hold_keys_that_others_lack(
    checkpoint_dir: Path, rank: int, device_mesh: DeviceMesh
) -> None:
    mine: dict[str, Any] = {f"own {rank}": numbered(3, start=rank), f"value {rank}": rank}
    mine["all"] = spread(numbered(4), device_mesh, Shard(0))
    dcp.save(mine, checkpoint_id=checkpoint_dir)
    peer = 1 - rank
    target: dict[str, Any] = {f"own {peer}": torch.zeros(3), f"value {peer}": None}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, {f"own {peer}": numbered(3, start=peer), f"value {peer}": peer})
    target = {f"own {peer}": torch.zeros(3)} if rank else {}
    torch_dcp.load(target, checkpoint_id=checkpoint_dir)
    assert not rank or same(target[f"own {peer}"], numbered(3, start=peer))


def test_an_empty_state_dict_is_a_checkpoint(checkpoint_dir: Path) -> None:
    dcp.save({}, checkpoint_id=checkpoint_dir)
    target: dict[str, Any] = {}
    report = dcp.load(target, checkpoint_id=checkpoint_dir)
    assert (target, report.missing, report.unexpected) == ({}, (), ())


def test_a_rank_may_hold_nothing(checkpoint_dir: Path, rank: int) -> None:
    dcp.save({} if rank else {"a": numbered(3)}, checkpoint_id=checkpoint_dir)
    target = {"a": torch.zeros(3)} if rank else {}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert not rank or torch.equal(target["a"], numbered(3))


def test_tied_weights_are_loaded_once_each_and_stay_tied(checkpoint_dir: Path) -> None:
    weight = numbered(4, 2)
    dcp.save({"embed": weight, "head": weight}, checkpoint_id=checkpoint_dir)
    tied = torch.zeros(4, 2)
    target = {"embed": tied, "head": tied}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["embed"] is target["head"] is tied
    assert torch.equal(tied, weight)


def test_a_view_of_a_big_storage_is_stored_alone(checkpoint_dir: Path) -> None:
    big = torch.zeros(1 << 20)
    big[100:104] = numbered(4)
    dcp.save(
        {"view": big[100:104], "row": big.view(1024, 1024)[:, 100]}, checkpoint_id=checkpoint_dir
    )
    assert sum(path.stat().st_size for path in checkpoint_dir.iterdir()) < 64 << 10
    target = {"view": torch.zeros(4), "row": torch.zeros(1024)}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert torch.equal(target["view"], numbered(4))


def test_a_pending_reduction_is_refused_by_name(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    dcp.save({"w": numbered(2)}, checkpoint_id=checkpoint_dir / "whole")
    pending = DTensor.from_local(torch.ones(2), device_mesh, [Partial()])
    replicated = spread(numbered(2), device_mesh, Replicate())
    model = {"model": {"w": pending, "v": replicated}}
    words = r"'model\.w'.*Partial.*redistribute"
    with pytest.raises(CheckpointException, match=words):
        dcp.save(model, checkpoint_id=checkpoint_dir / "partial")
    with pytest.raises(CheckpointException, match=words):
        dcp.load(
            {"model.w": pending},
            checkpoint_id=checkpoint_dir / "whole",
            rename={"model.w": "w"},
        )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: torch.ones(2, device="meta"), "'bad' is on the meta device"),
        (lambda: torch.ones(2, 2).to_sparse(), "'bad' has layout torch.sparse_coo"),
    ],
)
def test_a_tensor_without_bytes_is_refused_by_name(
    checkpoint_dir: Path, value: Any, words: str
) -> None:
    with pytest.raises(CheckpointException, match=words):
        dcp.save({"bad": value(), "good": torch.ones(1)}, checkpoint_id=checkpoint_dir)
    assert not (checkpoint_dir / ".metadata").exists()
