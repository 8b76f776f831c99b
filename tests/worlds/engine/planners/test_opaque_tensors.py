"""Wrapper subclasses and quantised tensors: saved as torch pickles them, loaded without code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType
from pytest_dcp.errors import CheckpointMismatchError
from support.opaque_tensors import Outer, Scaled, inside, outer, per_channel, per_tensor, scaled

pytestmark = [
    pytest.mark.world_size(2, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

KINDS = [scaled, outer, per_tensor, per_channel]
Make = Callable[[int], Any]


@pytest.fixture
def trusted() -> Any:
    """Torch's engine reads the classes that the program allows."""
    with torch.serialization.safe_globals([Scaled, Outer]):
        yield


@pytest.mark.parametrize("make", KINDS)
def test_they_go_round_into_the_same_memory(make: Make, checkpoint_dir: Path) -> None:
    dcp.save({"m": {"w": make(3), "x": torch.ones(2)}}, checkpoint_id=checkpoint_dir)
    target = make(1)
    state = {"m": {"w": target, "x": torch.zeros(2)}}
    dcp.load(state, checkpoint_id=checkpoint_dir)
    assert state["m"]["w"] is target
    assert inside(target) == inside(make(3))
    assert state["m"]["x"].tolist() == [1, 1]


@pytest.mark.parametrize("make", KINDS)
def test_torchs_engine_reads_ours(make: Make, checkpoint_dir: Path, trusted: Any) -> None:
    dcp.save({"w": make(3)}, checkpoint_id=checkpoint_dir)
    state = {"w": make(1)}
    torch_dcp.load(state, checkpoint_id=checkpoint_dir)
    assert inside(state["w"]) == inside(make(3))


@pytest.mark.parametrize("make", KINDS)
def test_ours_reads_a_checkpoint_of_torchs_engine(make: Make, checkpoint_dir: Path) -> None:
    torch_dcp.save({"w": make(3), "x": torch.ones(2)}, checkpoint_id=checkpoint_dir)
    state = {"w": make(1), "x": torch.zeros(2)}
    dcp.load(state, checkpoint_id=checkpoint_dir)
    assert inside(state["w"]) == inside(make(3))
    assert state["x"].tolist() == [1, 1]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_they_are_copied_for_the_background(
    make: Make, kind: AsyncCheckpointerType, checkpoint_dir: Path
) -> None:
    value = make(3)
    done: Any = dcp.async_save(
        {"w": value}, checkpoint_id=checkpoint_dir, async_checkpointer_type=kind
    )
    if isinstance(value, Scaled):
        value.values.zero_()
    else:
        value.copy_(make(1))
    done.result()
    state = {"w": make(1)}
    dcp.load(state, checkpoint_id=checkpoint_dir)
    assert inside(state["w"]) == inside(make(3))


@pytest.mark.parametrize("engine", [dcp, torch_dcp])
@pytest.mark.parametrize("make", [per_tensor, per_channel])
def test_a_quantised_tensor_needs_no_template(
    engine: Any, make: Make, checkpoint_dir: Path
) -> None:
    engine.save({"model": {"w": make(3)}}, checkpoint_id=checkpoint_dir)
    found = dcp.load_without_template(checkpoint_id=checkpoint_dir)
    assert inside(found["model"]["w"]) == inside(make(3))


def test_a_tensor_that_torch_stored_quantised_is_refused_into_a_plain_one(
    checkpoint_dir: Path,
) -> None:
    torch_dcp.save({"model": {"w": per_tensor(3)}}, checkpoint_id=checkpoint_dir)
    state = {"model": {"w": torch.zeros(6, dtype=torch.uint8)}}
    with pytest.raises(dcp.CheckpointException, match=r"'model\.w' is stored as torch\.quint8"):
        dcp.load(state, checkpoint_id=checkpoint_dir)


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("stored", ["per_tensor", "scaled"])
def test_they_never_take_the_place_of_a_plain_tensor(
    stored: str, parameter: bool, checkpoint_dir: Path
) -> None:
    made = {"per_tensor": per_tensor, "scaled": scaled}[stored](3)
    dcp.save({"m": {"first": 7, "w": made, "x": torch.ones(2)}}, checkpoint_id=checkpoint_dir)
    here = torch.zeros(made.shape)
    state = {
        "m": {"first": 1, "w": torch.nn.Parameter(here) if parameter else here, "x": torch.zeros(2)}
    }
    there = {
        "per_tensor": r"a quantised tensor of torch\.quint8 and size \(6,\)",
        "scaled": r"a support\.opaque_tensors\.Scaled of size \(2, 3\)",
    }[stored]
    before = dict(state["m"])
    said = rf"'m\.w' is {there} in the checkpoint, and a tensor of torch\.float32"
    with pytest.raises(CheckpointMismatchError, match=said) as caught:
        dcp.load(state, checkpoint_id=checkpoint_dir)
    assert caught.value.mismatched == ("m.w",)
    with torch.serialization.safe_globals([Scaled]):
        for planner in (dcp.DefaultLoadPlanner(allow_partial_load=True), None):
            with pytest.raises(CheckpointMismatchError, match=r"'m\.w' is a .* in the checkpoint"):
                dcp.load(state, checkpoint_id=checkpoint_dir, planner=planner)
    assert all(state["m"][name] is before[name] for name in before)
    assert here.tolist() == torch.zeros(made.shape).tolist()
    assert state["m"]["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("stored", "here", "said"),
    [
        (
            scaled,
            outer,
            r"'w' is a support\.opaque_tensors\.Scaled .* a Outer of size \(2, 3\) here",
        ),
        (scaled, lambda _: scaled(1, block=64), r"'w\.block' is 32 .* 64 here"),
        (scaled, per_tensor, r"'w' is a support\.opaque_tensors\.Scaled"),
        (per_tensor, per_channel, r"'w' is a tensor of size \(6,\)"),
        (per_tensor, scaled, r"'w' is a tensor of size \(6,\)"),
        (
            lambda _: torch.quantize_per_tensor(torch.ones(2, 3), 1, 0, torch.qint8),
            per_channel,
            r"'w' is torch\.per_tensor_affine .* torch\.per_channel_affine here",
        ),
    ],
)
def test_another_kind_is_refused_by_name_and_nothing_changes(
    stored: Make, here: Make, said: str, checkpoint_dir: Path
) -> None:
    dcp.save({"w": stored(3)}, checkpoint_id=checkpoint_dir)
    target = here(1)
    with pytest.raises(dcp.CheckpointException, match=rf"(?s){said}"):
        dcp.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert inside(target) == inside(here(1))


def holey() -> Scaled:
    """A wrapper around a tensor that no checkpoint holds."""
    return Scaled(torch.zeros(2, 3, dtype=torch.int8), torch.tensor([0.0, 1.0]).to_sparse())


def refused(rank: int, mesh: DeviceMesh) -> dict[str, tuple[Any, str]]:
    parts = [torch.ones(2), torch.ones(3)]
    values = {
        "jagged": (torch.nested.nested_tensor(parts, layout=torch.jagged), "a nested tensor"),
        "nested": (torch.nested.nested_tensor(parts), "a nested tensor"),
        "masked": (
            torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False])),
            "a masked tensor",
        ),
        "sparse": (torch.eye(2).to_sparse(), "has layout torch.sparse_coo"),
        "sharded": (
            DTensor.from_local(holey(), mesh, [Replicate()], run_check=False),
            ".scale' has layout torch.sparse_coo",
        ),
    }
    if hasattr(torch, "bcomplex32"):
        made = torch.empty(2, dtype=torch.bcomplex32)
        values["brain"] = (made, "has dtype torch.bcomplex32")
    return values


def test_values_that_no_checkpoint_holds_are_named_together(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    values = refused(rank, device_mesh)
    state = {"first": torch.ones(2), "m": {name: value for name, (value, _) in values.items()}}
    with pytest.raises(dcp.CheckpointException, match=f"{len(values)} value") as caught:
        dcp.save(state, checkpoint_id=checkpoint_dir)
    for name, (_, said) in values.items():
        between = "" if said.startswith(".") else "' is " if said.startswith("a ") else "' "
        assert f"'m.{name}{between}{said}" in str(caught.value)
