"""torch's own failure tests, under its names: errors name the failing ranks and no others.

Each case runs on our engine and on torch's.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _create_default_local_metadata

import pytest_dcp.checkpoint as ours
from pytest_dcp.faults import FaultyStorageReader, FaultyStorageWriter
from pytest_dcp.faults.injection.torch_test_storages import READER_KEYS, WRITER_KEYS

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")
"""As Any: it exports its names without saying so to a type checker."""

ENGINES = [pytest.param(ours, id="ours"), pytest.param(torch_dcp, id="torch")]

pytestmark = [
    pytest.mark.parametrize("engine", ENGINES),
    pytest.mark.filterwarnings("ignore:`save_state_dict` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`load_state_dict` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"replicated": torch.rand(10, 10), "bytes": [1, 2, 3, 4]}


def save(engine: Any, coordinator: int = 0, **fails: Any) -> Callable[[], Any]:
    return lambda: engine.save_state_dict(
        state(),
        storage_writer=FaultyStorageWriter(fails),
        coordinator_rank=coordinator,
        no_dist=not dist.is_initialized(),
    )


def load(engine: Any, coordinator: int = 0, **fails: Any) -> Callable[[], Any]:
    target = state()
    metadata = _create_default_local_metadata(target)
    return lambda: engine.load_state_dict(
        target,
        storage_reader=FaultyStorageReader(metadata, fails),
        coordinator_rank=coordinator,
        no_dist=not dist.is_initialized(),
    )


def check(verb: Callable[[], Any], ranks: Sequence[int], *, any_type: bool = False) -> None:
    with pytest.raises(CheckpointException) as caught:
        verb()
    assert sorted(caught.value.failures) == sorted(ranks)
    for failure, _ in caught.value.failures.values():
        assert any_type or type(failure) is ValueError


@pytest.mark.world_size(4, isolation="module")
class TestOnFourRanks:
    def test_storages_that_do_not_fail_save_and_load(self, engine: Any) -> None:
        save(engine)()
        load(engine)()

    def test_a_save_names_the_failed_ranks_on_every_rank(self, engine: Any) -> None:
        check(save(engine, fail_set_up_storage_writer=[0]), [0])
        check(save(engine, fail_finish=[0]), [0])
        check(save(engine, fail_prepare_global_plan=[0]), [0])
        check(save(engine, fail_prepare_local_plan=[0, 2]), [0, 2])
        check(save(engine, fail_write_data=[2]), [2])
        check(save(engine, fail_write_data_async=[3]), [3])
        check(save(engine, 1, fail_set_up_storage_writer=[1]), [1])
        check(save(engine, 1, fail_finish=[1]), [1])

    def test_a_load_names_the_failed_ranks_on_every_rank(self, engine: Any) -> None:
        check(load(engine, fail_set_up_storage_reader=[0]), [0])
        check(load(engine, fail_prepare_global_plan=[0]), [0])
        check(load(engine, fail_read_metadata=[0]), [0], any_type=True)
        check(load(engine, fail_deser_metadata=[2]), [2], any_type=True)
        check(load(engine, fail_prepare_local_plan=[1]), [1])
        check(load(engine, fail_read_data=[3]), [3])
        check(load(engine, fail_read_data_async=[1]), [1])
        check(load(engine, 3, fail_set_up_storage_reader=[0]), [0])
        check(load(engine, 1, fail_read_metadata=[3]), [3], any_type=True)
        check(load(engine, 2, fail_read_data=[0]), [0])
        check(load(engine, 3, fail_read_data_async=[2]), [2])
        check(load(engine, 1, fail_prepare_global_plan=[1]), [1])

    def test_the_hooks_of_a_rank_that_does_not_coordinate_are_not_called(self, engine: Any) -> None:
        save(engine, fail_finish=[1, 2, 3])()
        load(engine, fail_prepare_global_plan=[1, 2, 3])()


@pytest.mark.parametrize("key", WRITER_KEYS)
def test_a_save_without_a_group_fails_in_the_same_way(engine: Any, key: str) -> None:
    check(save(engine, **{key: [0]}), [0])
    save(engine, **{key: [1]})()


@pytest.mark.parametrize("key", READER_KEYS)
def test_a_load_without_a_group_fails_in_the_same_way(engine: Any, key: str) -> None:
    check(load(engine, **{key: [0]}), [0], any_type="metadata" in key)
    load(engine, **{key: [1]})()


def test_a_key_that_no_hook_looks_at_is_refused_and_others_are_the_test_s_own(
    engine: Any,
) -> None:
    with pytest.raises(ValueError, match="did you mean fail_finish"):
        FaultyStorageWriter({"fail_finnish": [0]})
    kept = FaultyStorageWriter({"fail_finish": [0], "ignore_exception_type": [1]})
    assert pickle.loads(pickle.dumps(kept)).fail_conf == kept.fail_conf
