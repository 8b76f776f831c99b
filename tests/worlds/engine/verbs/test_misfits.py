"""Misfits found only on reading: all keys and ranks are checked before any change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError
from support.opaque_tensors import inside, outer, scaled
from support.states import torch_dcp

pytestmark = [
    pytest.mark.world_size(2, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def two(value: float, size: int = 3) -> Any:
    return TwoTensor(torch.full((size,), value), torch.full((size,), -value))  # type: ignore[no-untyped-call]


def stored() -> dict[str, Any]:
    return {
        "a": torch.ones(4),
        "number": 2.5,
        "text": "stored",
        "step": torch.tensor(float(1 << 60)),
        "opaque": scaled(3),
        "z": torch.ones(4),
    }


def target() -> dict[str, Any]:
    """A target that the whole checkpoint fits."""
    return {
        "a": torch.zeros(4),
        "number": torch.tensor(0.0),
        "text": "mine",
        "step": 0.0,
        "opaque": scaled(1),
        "z": torch.zeros(4),
    }


def told(state: dict[str, Any]) -> dict[str, Any]:
    """Everything that a load could change, to compare."""
    return {
        key: inside(value) if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }


@pytest.fixture
def folder(checkpoint_dir: Path) -> Path:
    dcp.save(stored(), checkpoint_id=checkpoint_dir)
    return checkpoint_dir


MISFITS = {
    "number": (lambda: torch.zeros(2), r"'number' is the number 2\.5 in the checkpoint"),
    "text": (lambda: torch.tensor(0.0), r"'text' is a Python value \(str\) in the checkpoint"),
    "opaque": (lambda: outer(1), r"'opaque' is a support\.opaque_tensors\.Scaled"),
}


@pytest.mark.parametrize("who", ["every rank", "rank 1"])
@pytest.mark.parametrize("key", MISFITS)
def test_nothing_changes_on_any_rank_where_one_value_does_not_fit(
    folder: Path, rank: int, key: str, who: str
) -> None:
    make, said = MISFITS[key]
    state = target()
    if who == "every rank" or rank == 1:
        state[key] = make()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    before = told(state)
    with pytest.raises(CheckpointMismatchError, match=said):
        dcp.load(state, checkpoint_id=folder)
    assert told(state) == before
    assert all(state[name] is value for name, value in tensors.items())


def test_every_value_that_does_not_fit_is_named_at_once(folder: Path) -> None:
    state = target() | {key: make() for key, (make, _) in MISFITS.items()}
    before = told(state)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(state, checkpoint_id=folder)
    for cause, _ in caught.value.failures.values():
        assert isinstance(cause, CheckpointMismatchError)
        assert set(cause.mismatched) == set(MISFITS)
    assert told(state) == before


def test_a_tensor_that_gives_no_such_number_is_judged_before_anything_changes(
    checkpoint_dir: Path, rank: int
) -> None:
    dcp.save(stored() | {"step": torch.tensor((1 << 60) + 1)}, checkpoint_id=checkpoint_dir)
    state = target()
    before = told(state)
    with pytest.raises(CheckpointMismatchError, match=f"'step' is a tensor of {(1 << 60) + 1}"):
        dcp.load(state, checkpoint_id=checkpoint_dir)
    assert told(state) == before
    if rank == 1:
        state["step"] = 0
    with pytest.raises(CheckpointMismatchError, match="'step' is a tensor of"):
        dcp.load(state, checkpoint_id=checkpoint_dir)
    assert told(state) == (before if rank == 0 else before | {"step": 0})


def test_matching_entries_are_loaded_and_reported(folder: Path) -> None:
    state = target()
    report = dcp.load(state, checkpoint_id=folder)
    assert told(state) == told(stored() | {"number": torch.tensor(2.5), "step": float(1 << 60)})
    assert report.converted == {
        "number": (float, torch.float32),
        "step": (torch.float32, float),
    }


@pytest.mark.parametrize("rank_of_it", [0, 1])
def test_wrappers_that_torch_wrote_are_judged_before_anything_changes(
    checkpoint_dir: Path, rank: int, rank_of_it: int
) -> None:
    torch_dcp.save(
        {"a": torch.ones(4), "one": two(5), "two": two(7), "z": 3}, checkpoint_id=checkpoint_dir
    )
    state = {"a": torch.zeros(4), "one": two(0), "two": two(0), "z": 0}
    if rank == rank_of_it:
        state["two"].b = torch.zeros(5)
    with pytest.raises(CheckpointMismatchError, match=r"'two\.b' is a tensor of size \(3,\)"):
        dcp.load(state, checkpoint_id=checkpoint_dir)
    assert state["a"].tolist() == [0] * 4
    assert state["one"].a.tolist() == [0] * 3
    assert state["z"] == 0


class Custom:
    """No load takes it by default."""


@pytest.mark.filterwarnings("ignore:.*refused by load:UserWarning")
def test_a_value_that_one_rank_refuses_leaves_every_rank_as_it_was(
    checkpoint_dir: Path, rank: int
) -> None:
    dcp.save(
        {"w": torch.ones(4), f"own {rank}": Custom() if rank else 5}, checkpoint_id=checkpoint_dir
    )
    state = {"w": torch.zeros(4), f"own {rank}": None}
    with pytest.raises(CheckpointCorruptError, match=r"entry 'own 1'"):
        dcp.load(state, checkpoint_id=checkpoint_dir)
    assert state["w"].tolist() == [0] * 4
    assert state[f"own {rank}"] is None


def test_a_meta_tensor_stays_where_a_stored_one_cannot_be_read(
    checkpoint_dir: Path,
) -> None:
    torch_dcp.save({"q": torch.ones(6), "m": torch.ones(3)}, checkpoint_id=checkpoint_dir)
    sharded = {"m": torch.empty(3, device="meta"), "q": torch.empty(5, device="meta")}
    with pytest.raises(CheckpointMismatchError, match="Size mismatch"):
        dcp.load(sharded, checkpoint_id=checkpoint_dir)
    assert all(value.is_meta for value in sharded.values())
