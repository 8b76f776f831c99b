"""Staging makes a copy; its memory is reused, but never while it is still referenced."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
import warnings
from concurrent.futures import Future
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.testing._internal.two_tensor import TwoTensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.background.state_transfer import pickle_state, ship_state, unpickle_state
from pytest_dcp._engine.staging.buffer_pool import IDLE, Memory, Pool, shared_memory_of
from pytest_dcp._engine.staging.stager import KEPT, KEPT_SHARED, stage_state
from pytest_dcp._engine.storages import folder_writer
from pytest_dcp.checkpoint.staging import (
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
    release_memory,
)
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType
from pytest_dcp.errors import PlanError


def state(n: int = 0) -> dict[str, Any]:
    """Tensors of several dtypes and layouts, and values."""
    return {
        "plain": torch.arange(6.0).reshape(2, 3) + n,
        "strided": (torch.arange(12.0).reshape(3, 4) + n).t()[::2],
        "view of a big storage": torch.zeros(1 << 20)[5:7] + n,
        "0-d": torch.tensor(n, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.int64),
        "odd bytes": torch.arange(3, dtype=torch.uint8) + n,
        "after odd bytes": torch.arange(3.0, dtype=torch.float64) + n,
        "conjugate": (torch.arange(2.0) + 1j * (n + 1)).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2) * n),
        "nested": {"list": [torch.ones(2) * n, {"t": torch.zeros(1)}], "tuple": (n, torch.ones(1))},
        "value": {"set": {n}, "text": "x"},
    }


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return (
        [t for one in inner for t in tensors(one)] if isinstance(value, dict | list | tuple) else []
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


def addresses(value: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors(value)}


@pytest.mark.parametrize("shared", [True, False])
def test_a_copy_equals_the_state_and_shares_nothing_with_it(shared: bool) -> None:
    mine = state(3)
    copied = stage_state(mine, Pool(shared=shared))
    assert equal(copied, state(3))
    assert len(addresses(copied)) == 1
    for tensor in tensors(mine):
        tensor.detach().zero_()
    mine["value"]["set"].add(-1)
    mine["nested"]["list"].clear()
    assert equal(copied, state(3))
    assert all(t.is_contiguous() and not t.requires_grad for t in tensors(copied))


def test_only_the_bytes_of_a_view_are_copied() -> None:
    copied = stage_state({"v": torch.zeros(1 << 22)[:1]}, Pool(shared=False))
    assert copied["v"].untyped_storage().nbytes() <= mmap.PAGESIZE


def test_the_memory_of_a_copy_that_is_gone_serves_the_next() -> None:
    pool = Pool(shared=False)
    copied = stage_state(state(1), pool)
    where = addresses(copied)
    del copied
    for n in (2, 3):
        copied = stage_state(state(n), pool)
        assert addresses(copied) == where
        assert equal(copied, state(n))
        del copied


def test_memory_is_not_used_again_while_anybody_holds_one_tensor_of_it() -> None:
    pool = Pool(shared=False)
    held = stage_state(state(1), pool)["nested"]["list"][0][1:]
    for n in (2, 3):
        copied = stage_state(state(n), pool)
        assert addresses(copied).isdisjoint(addresses(held))
    assert held.tolist() == [1.0]
    where = addresses(held)
    del copied, held
    both = [stage_state(state(4), pool), stage_state(state(5), pool)]
    assert where <= addresses(both)


def test_a_state_of_another_shape_that_fits_uses_it_too() -> None:
    pool = Pool(shared=False)
    copied = stage_state({"t": torch.ones(4096)}, pool)
    where = addresses(copied)
    del copied
    copied = stage_state({"u": torch.ones(1024), "v": torch.ones(2, 1024, dtype=torch.int16)}, pool)
    assert addresses(copied) == where


def test_a_state_that_shrank_lets_go_of_big_memory() -> None:
    pool = Pool(shared=False)
    del (copied := {"s": stage_state({"t": torch.ones(1 << 20)}, pool)})["s"]
    assert [memory.nbytes for memory in pool.idle] == [4 << 20]
    for _ in range(2):
        small = [stage_state({"t": torch.ones(1 << 12)}, pool) for _ in range(IDLE)]
        del small
    assert [memory.nbytes for memory in pool.idle] == [4 << 12] * IDLE
    assert copied == {}


def test_a_pool_keeps_a_bounded_number_of_stretches() -> None:
    pool = Pool(shared=False)
    copies = [stage_state({"t": torch.ones(n * 4096)}, pool) for n in range(1, 9)]
    assert pool.idle == []
    copies.clear()
    assert len(pool.idle) == IDLE
    big = stage_state({"t": torch.ones(1 << 20)}, pool)
    assert len(pool.idle) == IDLE - 1
    del big
    pool.clear()
    assert pool.idle == []


def test_a_closed_pool_keeps_nothing_that_comes_back() -> None:
    pool = Pool(shared=True)
    copied = stage_state(state(), pool)
    pool.close()
    del copied
    assert pool.idle == []


def test_shared_memory_leaves_no_descriptor_behind() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool(shared=True)
    for n in range(3):
        stage_state(state(n), pool)
    one = 2  # the mapping has a descriptor of its own
    assert len(os.listdir("/proc/self/fd")) == before + one
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_that_stage_at_once_never_share_memory() -> None:
    pool = Pool(shared=False)
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(50):
            copied = stage_state({"t": torch.full((1000,), float(n))}, pool)
            if not bool((copied["t"] == n).all()):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(pool.idle) <= IDLE


def test_a_tensor_without_memory_is_named() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(PlanError, match=r"'model\.layer\.0' has no memory for its values"):
        stage_state({"model": {"layer": [freed]}}, Pool(shared=False))


def without_values(kind: str) -> torch.Tensor:
    """A tensor that no save can hold, and most copies fail of."""
    parts = [torch.ones(2), torch.ones(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        if kind == "nested":
            return torch.nested.nested_tensor(parts)
        if kind == "jagged":
            return torch.nested.nested_tensor(parts, layout=torch.jagged)
    meta = torch.ones(2, device="meta")
    if kind == "wrapper":
        wrapper: torch.Tensor = TwoTensor(meta, meta)  # type: ignore[no-untyped-call]
        return wrapper
    return meta


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["nested", "jagged", "meta", "wrapper"])
@pytest.mark.parametrize("verb", ["save", "async_save"])
def test_a_tensor_without_values_is_named_as_a_save_names_it(
    verb: str, kind: str, tmp_path: Path
) -> None:
    bad: Any = {
        "k": {"w": without_values(kind)},
        "more": [without_values(kind)],
        "b": torch.ones(2),
    }

    def attempt() -> None:
        started: Any = getattr(dcp, verb)(bad, checkpoint_id=tmp_path)
        if verb == "async_save":
            started.result(60)

    with pytest.raises(BaseException, match=r"2 value\(s\) cannot be saved") as caught:
        attempt()
    assert isinstance(caught.value, PlanError)
    reason = "a nested tensor: save its" if kind in ("nested", "jagged") else "on the meta device"
    for name in ("k.w", "more.0"):
        assert f"{name!r} is {reason}" in str(caught.value)


@pytest.mark.parametrize("kind", ["nested", "jagged", "meta", "wrapper"])
def test_nothing_is_copied_where_something_has_no_values(kind: str) -> None:
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    kept = stager.stage({"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(PlanError, match=r"1 value.*\n'b' is "):
        stager.stage({"a": torch.zeros(2), "b": without_values(kind)})
    assert kept["a"].tolist() == [1, 1]
    stager.close()


def test_a_tensor_that_an_arena_cannot_hold_is_copied_alone() -> None:
    sparse = torch.eye(3).to_sparse()
    copied = stage_state({"sparse": sparse, "dense": torch.ones(1)}, Pool(shared=True))
    sparse.zero_()
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(3))


class TestShipping:
    def sent(self, state: Any) -> Any:
        """The state as another process finds it."""
        shipment = ship_state(state)
        if shipment.memory is None:
            return unpickle_state(shipment.pickled)
        pages = mmap.mmap(shipment.memory.fd, shipment.memory.nbytes)
        return unpickle_state(
            shipment.pickled, torch.from_numpy(np.frombuffer(pages, dtype=np.uint8))
        )

    def test_a_state_in_shared_memory_is_sent_where_it_lies(self) -> None:
        copied = stage_state(state(2), Pool(shared=True))
        shipment = ship_state(copied)
        assert shipment.state is copied
        assert shipment.memory is shared_memory_of(copied["plain"])
        assert len(shipment.pickled) < 2000
        assert equal(self.sent(copied), state(2))

    def test_any_other_state_is_copied_there(self) -> None:
        assert equal(self.sent(state(2)), stage_state(state(2), Pool(shared=False)))
        mixed = {
            "a": stage_state(state(1), Pool(shared=True)),
            "b": stage_state(state(2), Pool(shared=True)),
        }
        assert equal(self.sent(mixed), {"a": state(1), "b": state(2)})

    def test_a_state_without_tensors_needs_no_memory(self) -> None:
        assert ship_state({"v": [1]}).memory is None
        assert self.sent({"v": [1]}) == {"v": [1]}

    def test_a_class_of_the_program_itself_travels_by_value(self) -> None:
        class Local:
            def told(self) -> int:
                return 3

        assert unpickle_state(pickle_state(Local())).told() == 3

    def test_memory_is_not_used_for_the_next_state_while_a_shipment_is_under_way(self) -> None:
        pool = Pool(shared=True)
        shipment = ship_state(stage_state(state(1), pool))
        other = stage_state(state(2), pool)
        assert shared_memory_of(other["plain"]) is not shipment.memory
        assert isinstance(shipment.memory, Memory)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_planner_travels_without_the_state_of_its_last_save(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True, enable_plan_caching=True)
    dcp.save({"t": torch.zeros(100_000)}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    data = pickle_state(planner)
    assert len(data) < 10_000
    assert unpickle_state(data).dedup_save_to_lowest_rank


class TestStagers:
    def test_torchs_async_save_takes_them(self) -> None:
        for stager in (BlockingAsyncStager(), DefaultStager()):
            assert isinstance(stager, AsyncStager)
            stager.close()

    @pytest.mark.parametrize("later", [True, False])
    def test_the_default_one_copies_now_or_later_and_keeps_its_memory(self, later: bool) -> None:
        stager = DefaultStager(StagingOptions(use_async_staging=later))
        seen = []
        for n in (1, 2):
            found = stager.stage(state(n))
            assert isinstance(found, Future) is later
            stager.synchronize_staging()
            copied = found.result(60) if isinstance(found, Future) else found
            assert equal(copied, state(n))
            seen.append(addresses(copied))
            if later:
                # The stager knows its last future.
                stager.stage({})
                stager.synchronize_staging()
            del copied, found
        assert seen[0] == seen[1]
        stager.close()

    def test_shared_memory_is_where_a_process_finds_it(self) -> None:
        for shared in (True, False):
            stager = DefaultStager(
                StagingOptions(use_shared_memory=shared, use_async_staging=False)
            )
            copied: Any = stager.stage(state())
            assert (shared_memory_of(copied["plain"]) is not None) is shared
            stager.close()

    def test_a_failure_is_the_futures(self) -> None:
        stager = DefaultStager()
        freed = torch.ones(4)
        freed.untyped_storage().resize_(0)
        found: Any = stager.stage({"t": freed})
        assert isinstance(found.exception(60), PlanError)
        stager.close()

    def test_the_blocking_one_keeps_memory_only_on_request(self) -> None:
        for keep in (True, False):
            stager = BlockingAsyncStager(cache_staged_state_dict=keep)
            where = addresses(stager.stage(state(1)))
            held = torch.empty(1 << 20)
            again = stager.stage(state(2))
            assert equal(again, state(2))
            if keep:
                assert addresses(again) == where
            del held, again
            assert (stager.state_dict_cache is not None) == keep
            stager.close()

    def test_the_blocking_one_names_a_value_of_another_type(self) -> None:
        stager = BlockingAsyncStager(type_check=True)
        stager.stage({"a": [1, {"b": torch.ones(1)}]})
        with pytest.raises(ValueError, match=r"'a\.0\.b' is a object"):
            stager.stage({"a": [{"b": object()}]})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
@pytest.mark.parametrize("given", ["nothing", "writer", "planner"])
def test_async_save_stages_into_the_memory_of_the_last_one(tmp_path: Path, given: str) -> None:
    release_memory()
    options: dict[str, Any] = {"checkpoint_id": tmp_path}
    if given == "writer":
        options = {"storage_writer": dcp.FileSystemWriter(tmp_path)}
    if given == "planner":
        options["planner"] = dcp.DefaultSavePlanner()
    kept: list[list[Memory]] = []
    for n in range(4):
        started: Any = dcp.async_save(state(n) | {"value": n}, no_dist=True, **options)
        started.result(60)
        kept.append(list(KEPT.idle))
    if given == "planner":
        # It holds the state that it planned last, so that two stretches take turns.
        assert {len(idle) for idle in kept[1:]} == {1}
        assert len({id(memory) for idle in kept for memory in idle}) == 2
    else:
        assert {len(idle) for idle in kept} == {1}
        assert len({id(memory) for idle in kept for memory in idle}) == 1
    release_memory()
    assert KEPT.idle == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("how", "fails"),
    [
        *product(AsyncCheckpointerType, ["nowhere", "plan"]),
        (
            AsyncCheckpointerType.THREAD,
            "write",
        ),  # of a process, the rank sees the same as of a plan
    ],
)
def test_the_copy_is_free_when_its_future_is_done(how, fails, tmp_path, monkeypatch):
    release_memory()
    pool = KEPT_SHARED if how is AsyncCheckpointerType.PROCESS else KEPT
    before, leased = pool._leased_bytes, []
    target = tmp_path / "ckpt"
    if fails == "plan":
        target.write_bytes(b"in the way of the folder")
    if fails == "write":
        monkeypatch.setattr(folder_writer, "write_files", refuse)
    future: Any = dcp.async_save(
        {"w": torch.ones(100_000)}, checkpoint_id=target, no_dist=True, async_checkpointer_type=how
    )
    # Called in the thread of the save, before anybody who waits for the future can go on.
    future.add_done_callback(lambda _: leased.append(pool._leased_bytes - before))
    assert (future.exception(60) is not None) == (fails != "nowhere")
    assert leased == [0]


def refuse(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")
