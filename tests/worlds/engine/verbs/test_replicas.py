"""Several ranks hold one key: equal copies, copies that differ, and a value per rank."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.plan.replica_comparison import SAMPLED_AT_LEAST
from pytest_dcp.errors import CheckpointMismatchError, PlanError, ReplicaMismatchError
from support.states import blank, numbered, same, spread, torch_dcp

pytestmark = pytest.mark.world_size(4, isolation="module")


def refused(save: Callable[[], Any]) -> ReplicaMismatchError:
    """The error that the save ends in, the same on every rank."""
    with pytest.raises(CheckpointException) as caught:
        save()
    causes = [failure[0] for failure in caught.value.failures.values()]
    assert [type(cause) for cause in causes] == [ReplicaMismatchError]
    assert "step 'compare replicas'" in str(caught.value)
    found: Any = causes[0]
    return found


def test_a_tensor_that_differs_is_named_with_ranks_and_first_index(
    checkpoint_dir: Path, rank: int
) -> None:
    weight = torch.zeros(100, 7)
    if rank >= 2:
        weight[60, 3:] = float(rank)
    state = {"model": {"w": weight, "equal": numbered(5)}}
    error = refused(lambda: dcp.save(state, checkpoint_id=checkpoint_dir, replicas="check"))
    assert error.keys == ("model.w",)
    assert (
        "'model.w' differs first at index (60, 3): 0.0 on ranks 0-1, 2.0 on rank 2, 3.0 on rank 3"
    ) in str(error)
    assert "PerRank" in str(error)
    assert not (checkpoint_dir / ".metadata").exists()


def test_the_first_index_is_found_beyond_the_first_block(checkpoint_dir: Path, rank: int) -> None:
    value = torch.zeros(3, 50_000, dtype=torch.int32)
    value[2, 49_990:] = rank // 2
    error = refused(lambda: dcp.save({"w": value}, checkpoint_id=checkpoint_dir, replicas="check"))
    assert "first at index (2, 49990): 0 on ranks 0-1, 1 on ranks 2-3" in str(error)


def test_copies_that_drifted_apart_are_found_by_the_sample(checkpoint_dir: Path, rank: int) -> None:
    torch.manual_seed(rank)
    state = {f"layer{n}": torch.randn(300, 300) for n in range(40)}
    error = refused(lambda: dcp.save(state, checkpoint_id=checkpoint_dir))
    assert len(error.keys) == SAMPLED_AT_LEAST
    assert "first at index (0, 0)" in str(error)


def test_a_sharded_tensors_replicas_are_compared(checkpoint_dir: Path, rank: int) -> None:
    mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("dp", "tp"))
    value = spread(numbered(8, 3), mesh, Replicate(), Shard(0))
    if rank == 3:
        value.to_local()[1, 2] += 1
    error = refused(lambda: dcp.save({"w": value}, checkpoint_id=checkpoint_dir))
    assert "'w' differs first at index (5, 2)" in str(error)
    assert "on rank 1" in str(error)
    assert "on rank 3" in str(error)


def test_a_python_value_that_differs_is_named_with_its_place(
    checkpoint_dir: Path, rank: int
) -> None:
    state = {
        "step": 7,
        "loader": {"seen": (1, [2, 3 + rank // 3], "x")},
        "numpy": np.arange(6) * (1 + rank // 2),
    }
    error = refused(lambda: dcp.save(state, checkpoint_id=checkpoint_dir))
    assert error.keys == ("loader.seen", "numpy")
    assert "'loader.seen' differs first at [1][1]: 3 on ranks 0-2, 4 on rank 3" in str(error)
    assert "'numpy' differs first at [1]: 1 on ranks 0-1, 2 on ranks 2-3" in str(error)


def test_values_that_are_equal_in_another_order_are_equal(checkpoint_dir: Path, rank: int) -> None:
    words = ["b", "a", "c", "d"]
    random.Random(rank).shuffle(words)
    text = "".join(["sha", "red"])
    state = {
        "dict": ({word: len(word) for word in words},),
        "set": ({*words},),
        # One string object twice, or two of them.
        "shared": (text, text) if rank % 2 else (text, "".join(["sha", "red"])),
        "nan": float("nan"),
        "inside": ({"w": torch.ones(3)}, np.float32(2)),
        "nothing": (),
    }
    dcp.save(state, checkpoint_id=checkpoint_dir, replicas="check")


def test_equal_copies_pass_and_off_compares_nothing(checkpoint_dir: Path, rank: int) -> None:
    mesh = DeviceMesh("cpu", torch.arange(4))
    equal = {
        "plain": numbered(40, 3),
        "strided": numbered(40, 6).t()[::2],
        "bool": torch.ones(3, dtype=torch.bool),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "sharded": spread(numbered(9), mesh, Shard(0)),
        "replicated": spread(numbered(9), mesh, Replicate()),
        "value": ("a", 1, None),
    }
    dcp.save(equal, checkpoint_id=checkpoint_dir / "equal", replicas="check")
    target = blank(equal)
    dcp.load(target, checkpoint_id=checkpoint_dir / "equal")
    assert same(target, equal)
    bits = {"conj": torch.full((4,), 1 + 2j).conj(), "neg": torch.full((4,), 1 + 2j).conj().imag}
    dcp.save(bits, checkpoint_id=checkpoint_dir / "bits", replicas="check")
    differing = {"w": torch.full((2,), float(rank)), "step": rank}
    dcp.save(differing, checkpoint_id=checkpoint_dir / "off", replicas="off")
    planner = dcp.DefaultSavePlanner(replicas="off")
    dcp.save(differing, checkpoint_id=checkpoint_dir / "planner", planner=planner)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_each_save_is_compared_with_a_remembered_plan_too(
    checkpoint_dir: Path, rank: int, cached: bool
) -> None:
    planner = dcp.DefaultSavePlanner(replicas="check", enable_plan_caching=cached)
    for step in range(3):
        dcp.save({"w": torch.ones(3), "step": step}, checkpoint_id=checkpoint_dir, planner=planner)
    with pytest.raises(CheckpointException, match="'step' differs: 3 on rank 0, 4 on rank"):
        dcp.save(
            {"w": torch.ones(3), "step": 3 if rank == 0 else 3 + rank},
            checkpoint_id=checkpoint_dir,
            planner=planner,
        )
    target = {"w": torch.zeros(3), "step": -1}
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["step"] == 2


def test_a_save_in_the_background_compares_too(checkpoint_dir: Path, rank: int) -> None:
    future: Any = dcp.async_save({"step": rank}, checkpoint_id=checkpoint_dir)
    assert refused(future.result).keys == ("step",)


class Reversing(dcp.DefaultSavePlanner):
    """Joins other plans than the ranks', as frameworks do that filter or regroup them."""

    def create_global_plan(self, all_plans: list[Any]) -> Any:
        return super().create_global_plan(
            [dataclasses.replace(plan, items=list(plan.items)[::-1]) for plan in all_plans]
        )


class Doubling(dcp.DefaultSavePlanner):
    """Saves a computed value, which differs from the state's."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return super().transform_object(write_item, object)


@pytest.mark.parametrize("planner", [Reversing, Doubling])
def test_planners_whose_rows_or_data_are_not_known_are_not_compared(
    checkpoint_dir: Path, rank: int, planner: Any
) -> None:
    state = {"a": torch.zeros(3), "b": torch.full((3,), float(rank)), "c": 1, "d": torch.ones(7)}
    dcp.save(state, checkpoint_id=checkpoint_dir, planner=planner(replicas="check"))
    target = blank(state)
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert target["d"].tolist() == [1] * 7


def test_a_planner_that_was_pickled_compares(checkpoint_dir: Path, rank: int) -> None:
    planner = dcp.DefaultSavePlanner(replicas="check")
    dcp.save({"a": 1, "b": torch.ones(2)}, checkpoint_id=checkpoint_dir / "a", planner=planner)
    again = pickle.loads(pickle.dumps(planner))
    state = {"a": (np.ones(1),), "b": torch.ones(2)}
    dcp.save(state, checkpoint_id=checkpoint_dir / "b", planner=again)
    differing = {"a": rank, "b": torch.ones(2)}
    error = refused(lambda: dcp.save(differing, checkpoint_id=checkpoint_dir / "c", planner=again))
    assert error.keys == ("a",)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="'sample', 'check' or 'off'"):
        dcp.DefaultSavePlanner(replicas="always")  # type: ignore[arg-type]  # on purpose


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_the_environment_chooses_for_code_that_passes_nothing(
    checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    differing = {"buffer": torch.full((2,), float(rank))}
    error = refused(lambda: dcp.save(differing, checkpoint_id=checkpoint_dir))
    assert "set DCP_REPLICAS=off" in str(error)
    monkeypatch.setenv("DCP_REPLICAS", "off")
    dcp.save(differing, checkpoint_id=checkpoint_dir)
    dcp.save(differing, checkpoint_id=checkpoint_dir, planner=dcp.DefaultSavePlanner())
    refused(lambda: dcp.save(differing, checkpoint_id=checkpoint_dir, replicas="check"))
    monkeypatch.setenv("DCP_REPLICAS", "never")
    with pytest.raises(ValueError, match="DCP_REPLICAS in the environment must be 'sample'"):
        dcp.DefaultSavePlanner()


# ---- values per rank


def own(rank: int) -> dict[str, Any]:
    return {
        "rng": dcp.PerRank(torch.arange(rank + 1)),
        "seen": dcp.PerRank({"shards": [rank, rank + 1], "deep": {"t": torch.full((2,), rank)}}),
        "shared": 5,
    }


def empty(rank: int) -> dict[str, Any]:
    return {
        "rng": dcp.PerRank(torch.zeros(rank + 1, dtype=torch.int64)),
        "seen": dcp.PerRank({"shards": None, "deep": {"t": torch.zeros(2, dtype=torch.int64)}}),
        "shared": None,
    }


@pytest.mark.parametrize("background", [False, True])
def test_each_rank_gets_its_own_value_back(
    checkpoint_dir: Path, rank: int, background: bool
) -> None:
    if background:
        future: Any = dcp.async_save(own(rank), checkpoint_id=checkpoint_dir)
        future.result()
    else:
        dcp.save(own(rank), checkpoint_id=checkpoint_dir, replicas="check")
    target = empty(rank)
    report = dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(dict(target["rng"]), {f"rank_{rank}_of_4": torch.arange(rank + 1)})
    assert target["seen"].value["shards"] == [rank, rank + 1]
    assert target["seen"].value["deep"]["t"].tolist() == [rank, rank]
    assert (report.missing, report.unexpected) == ((), ())


def test_torch_reads_values_per_rank_and_saves_them(checkpoint_dir: Path, rank: int) -> None:
    dcp.save(own(rank), checkpoint_id=checkpoint_dir / "ours")
    target: Any = {"rng": {"rank_2_of_4": torch.zeros(3, dtype=torch.int64)}}
    torch_dcp.load(target, checkpoint_id=checkpoint_dir / "ours")
    assert target["rng"]["rank_2_of_4"].tolist() == [0, 1, 2]
    torch_dcp.save(own(rank), checkpoint_id=checkpoint_dir / "torchs")
    back = empty(rank)
    dcp.load(back, checkpoint_id=checkpoint_dir / "torchs")
    assert back["rng"].value.tolist() == list(range(rank + 1))


def test_another_number_of_ranks_is_refused_unless_a_function_chooses(
    checkpoint_dir: Path, rank: int
) -> None:
    dcp.save(own(rank), checkpoint_id=checkpoint_dir)
    alone: Any = {"seen": dcp.PerRank(empty(0)["seen"].value)}
    with (
        pytest.warns(UserWarning, match="single process"),
        pytest.raises(CheckpointException, match="'seen' holds one value of each of 4 ranks") as e,
    ):
        dcp.load(alone, checkpoint_id=checkpoint_dir, no_dist=True)
    assert isinstance(e.value.failures[0][0], CheckpointMismatchError)

    asked = []

    def third(rank: int, size: int, saved: int) -> int:
        asked.append((rank, size, saved))
        return 3

    alone = {"seen": dcp.PerRank(empty(0)["seen"].value, when_resized=third)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(alone, checkpoint_id=checkpoint_dir, no_dist=True)
    assert alone["seen"].value["shards"] == [3, 4]
    assert alone["seen"].value["deep"]["t"].tolist() == [3, 3]
    assert set(asked) == {(0, 1, 4)}

    kept: Any = {"seen": dcp.PerRank({"shards": "mine"}, when_resized=lambda *_: None)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(kept, checkpoint_id=checkpoint_dir, no_dist=True)
    assert kept["seen"].value["shards"] == "mine"


def test_ranks_are_those_of_the_process_group(checkpoint_dir: Path, rank: int) -> None:
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    group, folder = pairs[rank // 2], checkpoint_dir / str(rank // 2)
    dcp.save({"v": dcp.PerRank(rank)}, checkpoint_id=folder, process_group=group)
    target: Any = {"v": dcp.PerRank(None)}
    dcp.load(target, checkpoint_id=folder, process_group=group)
    assert target["v"].value == rank
    assert dcp.load_without_template(checkpoint_id=folder, process_group=group) == {
        "v": {0: 2 * (rank // 2), 1: 2 * (rank // 2) + 1}
    }


def test_a_distributed_tensor_is_no_value_of_one_rank(
    checkpoint_dir: Path, device_mesh: DeviceMesh
) -> None:
    state = {"w": dcp.PerRank({"x": spread(numbered(8), device_mesh, Shard(0))})}
    with pytest.raises(CheckpointException, match="'w' is a DTensor inside PerRank"):
        dcp.save(state, checkpoint_id=checkpoint_dir)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with pytest.raises(CheckpointException, match="'w' is a PerRank: it needs flatten_state_dict"):
        dcp.save({"w": dcp.PerRank(1)}, checkpoint_id=checkpoint_dir, planner=planner)


@pytest.mark.parametrize(
    "other", [5, torch.ones(2), {"x": 1}, {}, [torch.ones(1)], {"rank_0_of_4": 1}], ids=repr
)
def test_a_value_per_rank_beside_another_value_under_its_key_is_refused(
    checkpoint_dir: Path, rank: int, other: Any
) -> None:
    value = other if rank == 2 else dcp.PerRank(rank)
    state = {"data": {"rng": value, "step": 1}}
    if rank == 3:
        del state["data"]["rng"]  # A rank may lack the key.
    with pytest.raises(
        CheckpointException, match=r"'data\.rng' is a PerRank on ranks 0-1, and .* on rank 2\n"
    ) as caught:
        dcp.save(state, checkpoint_id=checkpoint_dir)
    assert isinstance(caught.value, PlanError)
    assert not any(checkpoint_dir.iterdir())


def test_a_value_per_rank_may_be_lacking_on_a_rank(checkpoint_dir: Path, rank: int) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    for step in range(2):
        state = {"step": step} if rank == 1 else {"step": step, "rng": dcp.PerRank(rank)}
        dcp.save(state, checkpoint_id=checkpoint_dir / str(step), planner=planner)
    found = dcp.load_without_template(checkpoint_id=checkpoint_dir / "1")
    assert found == {"step": 1, "rng": {0: 0, 2: 2, 3: 3}}


@pytest.mark.parametrize("below", [1, torch.ones(1)], ids=["value", "tensor"])
@pytest.mark.parametrize("above", [5, torch.ones(3)], ids=["value", "tensor"])
def test_a_value_on_one_rank_and_a_container_on_another_have_no_common_state_dict(
    checkpoint_dir: Path, rank: int, above: Any, below: Any
) -> None:
    state = {"a": above if rank == 0 else {"b": below}, "c": 2}
    dcp.save(state, checkpoint_id=checkpoint_dir)
    target = blank(state)
    dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, state)
    with pytest.raises(CheckpointMismatchError, match=r"'a' is a value, and 'a\.b' is below it"):
        dcp.load_without_template(checkpoint_id=checkpoint_dir)
    assert dcp.load_without_template(checkpoint_id=checkpoint_dir, keys=["c"]) == {"c": 2}


def test_a_save_in_the_background_compares_as_asked(checkpoint_dir: Path, rank: int) -> None:
    def save(name: str, **options: Any) -> Any:
        state = {"w": torch.full((2,), float(rank // 2)), "equal": 1}
        future: Any = dcp.async_save(state, checkpoint_id=checkpoint_dir / name, **options)
        return future.result()

    save("off", replicas="off")
    error = refused(lambda: save("check", replicas="check"))
    assert "'w' differs first at index (0,): 0.0 on ranks 0-1, 1.0 on ranks 2-3" in str(error)
    assert not (checkpoint_dir / "check" / ".metadata").exists()
    with pytest.raises(ValueError, match="'sample', 'check' or 'off'"):
        save("no", replicas="always")
    with pytest.raises(ValueError, match="give it to your DefaultSavePlanner"):
        save("no", replicas="check", planner=dcp.DefaultSavePlanner())
