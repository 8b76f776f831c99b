"""Each law holds for an engine that is right, and says what is wrong of one that is not."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_dcp import properties as props
from pytest_dcp.errors import LawError
from pytest_dcp.properties import SameTensor, StateSpec, TensorSpec

STATE = StateSpec(
    {"w": TensorSpec((2, 3)), "tied": SameTensor("w"), "a": {"b": [TensorSpec(), 7]}, "name": "x"}
)
MODULE = props.PlacedModule(props.ModuleSpec("buffers"), optimizer=props.OptimizerSpec("adam"))
Save = Callable[[dict[str, Any]], None]


@dataclass
class Pickles:
    """The simplest engine: a pickle, one process. Two functions inject its mistakes."""

    saving: Save = field(default=lambda state: None)
    loaded: Callable[[dict[str, Any]], None] = field(default=lambda state: None)

    def save(
        self, state_dict: dict[str, Any], *, checkpoint_id: Any, process_group: Any = None
    ) -> None:
        folder = Path(checkpoint_id)
        folder.mkdir(parents=True, exist_ok=True)
        self.saving(state_dict)
        temporary, file = folder / "new", folder / "state"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT)
        os.write(fd, pickle.dumps(state_dict))
        os.fsync(fd)
        os.close(fd)
        temporary.rename(file)
        synced = os.open(folder, os.O_RDONLY)
        os.fsync(synced)
        os.close(synced)

    def load(
        self, state_dict: dict[str, Any], *, checkpoint_id: Any, process_group: Any = None
    ) -> None:
        stored = pickle.loads(Path(checkpoint_id, "state").read_bytes())
        _put(state_dict, {key: stored[key] for key in state_dict})
        self.loaded(state_dict)


def _put(target: Any, stored: Any) -> None:
    for key in target if isinstance(target, dict) else range(len(target)):
        value = target[key]
        if isinstance(value, dict | list):
            _put(value, stored[key])
        elif isinstance(value, torch.Tensor) and not value.is_meta:
            value.detach().copy_(stored[key])
        else:
            target[key] = stored[key]


def both(law: Any, placed: Any, *more: Any) -> Callable[[Path, Any], None]:
    return lambda folder, dcp: law(placed, placed, *more, folder, dcp=dcp)


PLACED = STATE.on()
LAWS: dict[str, Callable[[Path, Any], None]] = {
    "round trip": both(props.assert_round_trip, PLACED),
    "round trip of a module": both(props.assert_round_trip, MODULE),
    "meta load": both(props.assert_meta_load, PLACED),
    "inplace": both(props.assert_inplace, PLACED),
    "partial load": both(props.assert_partial_load, PLACED, ["w"]),
    "idempotent save": lambda f, dcp: props.assert_idempotent_save(PLACED, f, dcp=dcp),
    "overwrite atomic": lambda f, dcp: props.assert_overwrite_atomic(
        StateSpec({"w": TensorSpec((2, 3), seed=5)}).on(), PLACED, f, dcp=dcp
    ),
    "training resumes": both(props.assert_training_resumes, MODULE),
}


@pytest.mark.parametrize("law", LAWS)
def test_holds_for_an_engine_that_is_right(law: str, tmp_path: Path) -> None:
    LAWS[law](tmp_path, Pickles())


def flip_one_bit(state: dict[str, Any]) -> None:
    tensor = state["w"] if "w" in state else next(iter(state["model"].values()))
    tensor.detach().reshape(-1)[-1:].view(torch.uint8)[0] ^= 1


@pytest.mark.parametrize("law", [name for name in LAWS if name != "idempotent save"])
def test_breaks_when_one_bit_is_loaded_wrong(law: str, tmp_path: Path) -> None:
    with pytest.raises(LawError, match="1 of "):
        LAWS[law](tmp_path, Pickles(loaded=flip_one_bit))


def test_breaks_when_saving_changes_the_state(tmp_path: Path) -> None:
    with pytest.raises(LawError, match="saving, which leaves the state as it is"):
        LAWS["round trip"](tmp_path, Pickles(saving=flip_one_bit))


def replaced(state: dict[str, Any]) -> None:
    state["w"] = state["w"].clone()


def test_breaks_when_a_tensor_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(LawError, match="rank 0: w: was moved to other memory"):
        LAWS["inplace"](tmp_path, Pickles(loaded=replaced))


def test_breaks_when_bytes_between_the_elements_are_written(tmp_path: Path) -> None:
    placed = StateSpec({"w": TensorSpec((2,), memory="stepped")}).on()

    def spill(state: dict[str, Any]) -> None:
        state["w"].as_strided((1,), (1,), 1).zero_()

    with pytest.raises(LawError, match="w: bytes between its elements were written"):
        props.assert_inplace(placed, placed, tmp_path, dcp=Pickles(loaded=spill))


def test_breaks_when_a_meta_tensor_stays(tmp_path: Path) -> None:
    def unmade(state: dict[str, Any]) -> None:
        state["w"] = state["w"].to("meta")

    with pytest.raises(LawError, match="rank 0: w: kind: expected Tensor"):
        LAWS["meta load"](tmp_path, Pickles(loaded=unmade))


def test_breaks_when_saving_again_leaves_something(tmp_path: Path) -> None:
    def litter(state: dict[str, Any]) -> None:
        where = tmp_path / "one"
        where.mkdir(exist_ok=True)
        (where / f"left{len(list(where.iterdir()))}").write_bytes(b"")

    with pytest.raises(LawError, match="saving the loaded state"):
        LAWS["idempotent save"](tmp_path, Pickles(saving=litter))


class InPlace(Pickles):
    """Overwrites the existing file."""

    def save(
        self, state_dict: dict[str, Any], *, checkpoint_id: Any, process_group: Any = None
    ) -> None:
        Path(checkpoint_id).mkdir(exist_ok=True)
        Path(checkpoint_id, "state").write_bytes(pickle.dumps(state_dict))


def test_breaks_when_a_save_is_no_instant(tmp_path: Path) -> None:
    with pytest.raises(LawError, match="expected the old or the new one"):
        LAWS["overwrite atomic"](tmp_path, InPlace())


def test_an_engine_that_never_loads_does_not_pass_for_one_that_refuses(tmp_path: Path) -> None:
    """With no old checkpoint the first crash leaves none, and a load may fail there."""

    def mistake(state: dict[str, Any]) -> None:
        raise TypeError("a mistake of the engine's author")

    with pytest.raises(LawError, match=r"loading the saved state:\n  TypeError: a mistake"):
        props.assert_overwrite_atomic(
            None, PLACED, tmp_path, models=("kill",), budget=1, dcp=Pickles(loaded=mistake)
        )


def test_breaks_when_training_goes_on_from_elsewhere(tmp_path: Path) -> None:
    def without_moments(state: dict[str, Any]) -> None:
        for fqn, value in state["optim"].items():
            if fqn.endswith("exp_avg"):
                value.zero_()

    with pytest.raises(LawError, match=r"optim\.state\.down\.weight\.exp_avg.*: bits"):
        LAWS["training resumes"](tmp_path, Pickles(loaded=without_moments))


def test_a_layout_needs_a_world_that_is_large_enough(tmp_path: Path) -> None:
    placed = STATE.on(props.Layout(props.MeshSpec((2,))))
    with pytest.raises(ValueError, match="at least 2 ranks for this law, got 1"):
        props.assert_round_trip(placed, placed, tmp_path)


@pytest.mark.world_size(3)
def test_every_rank_says_the_same_of_a_difference_in_one(
    rank: int, checkpoint_dir: Path, world: Any
) -> None:
    from torch.distributed.tensor import Shard

    layout = props.Layout(props.MeshSpec((2,)), (Shard(0),))
    placed = StateSpec({"w": TensorSpec((4,))}).on(layout)

    class Wrong:
        """Rank 1 loads one element wrong."""

        def save(self, state_dict: Any, **kwargs: Any) -> None:
            pass

        def load(self, state_dict: Any, **kwargs: Any) -> None:
            state_dict["w"].to_local().copy_(torch.arange(2.0) + 1 + 2 * rank)
            if rank == 1:
                state_dict["w"].to_local()[1] = 9.0

    with pytest.raises(LawError) as raised:
        props.assert_round_trip(placed, placed, checkpoint_dir, dcp=Wrong())
    texts = world.gather(str(raised.value))
    assert len(set(texts)) == 1
    assert texts[0] == (
        "loading the saved state:\n"
        "  rank 1: w[3]: bits: expected 0x40800000 (4.0), got 0x41100000 (9.0), 1 of 2 elements"
    )
