"""Saves whose plans are remembered: they say less, and save the same."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.verbs import plan_memory
from pytest_dcp._engine.verbs.plan_exchange import PlanExchange
from support.states import blank, numbered, same, spread

pytestmark = pytest.mark.world_size(2, isolation="module")

NEW, KNOWN = ["NewPlan", "CompressedPlan"], ["KnownPlan", "RepeatedPlan"]


@contextmanager
def watch_messages() -> Iterator[list[str]]:
    """The kinds of the messages that this rank sends and gets in plan steps."""
    seen: list[str] = []
    offer, again, accept = PlanExchange.offer, PlanExchange.offer_again, PlanExchange.accept

    def note(message: Any) -> Any:
        seen.append(type(message).__name__)
        return message

    def take(exchange: PlanExchange, answer: Any) -> Any:
        note(answer.plan)
        return accept(exchange, answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanExchange, "offer", lambda *args: note(offer(*args)))
        patch.setattr(PlanExchange, "offer_again", lambda *args: note(again(*args)))
        patch.setattr(PlanExchange, "accept", take)
        yield seen


def messages_of(state: dict[str, Any], folder: Path, **options: Any) -> list[str]:
    """The messages of one save, whose checkpoint is then checked."""
    with watch_messages() as seen:
        dcp.save(state, checkpoint_id=folder, **options)
    target = blank(state)
    dcp.load(target, checkpoint_id=folder, process_group=options.get("process_group"))
    assert same(target, state)
    return seen


def forget(group: Any = None) -> plan_memory.PlanMemory:
    """Empty this rank's memory of a group, and return it."""
    memory = plan_memory.memory_of(group or dist.group.WORLD, 0)
    memory.structures, memory.parts, memory.answers = [], {}, {}
    return memory


@pytest.fixture(autouse=True)
def _no_memory(world: Any) -> None:
    forget()
    world.barrier()


@contextmanager
def watch_answers() -> Iterator[list[str]]:
    """The kinds of the messages with which saves end on this rank."""
    seen: list[str] = []
    read = PlanExchange.read_metadata

    def note(exchange: PlanExchange, message: Any) -> Any:
        seen.append(type(message).__name__)
        return read(exchange, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanExchange, "read_metadata", note)
        yield seen


def content_of(metadata: Any) -> dict[str, Any]:
    """All of a metadata that does not say which save it is of."""
    return {
        "keys": list(metadata.state_dict_metadata),
        "tensors": {fqn: str(value) for fqn, value in metadata.state_dict_metadata.items()},
        "planner": (
            None if metadata.planner_data is None else dict(metadata.planner_data),
            getattr(metadata.planner_data, "description", None),
        ),
        "places": {
            key: (info.relative_path.partition("-")[0].split("_")[:4], info.offset, info.length)
            for key, info in metadata.storage_data.items()
        },
    }


# ---- any sequence of states

SHAPES = ((3,), (4, 2), (2, 4), ())
DTYPES = (torch.float32, torch.int32, torch.float64)
TENSORS = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(["plain", "shard", "replica"])
)
COMMON = st.dictionaries(st.sampled_from("abc"), TENSORS | st.integers(0, 99), max_size=2)
OWN = st.none() | TENSORS | st.integers(0, 300) | st.just("value")
EVENTS = st.sampled_from(["", "", "", "rank forgets", "coordinator forgets", "fails"])
FLAGS = st.fixed_dictionaries(
    {},
    optional={"flatten_state_dict": st.just(False), "dedup_save_to_lowest_rank": st.just(True)},
)


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[Any, Any, str, dict[str, bool]]]:
    """Some steps: keys of all ranks, keys of one rank alone, what happens before, options.

    Few different ones, so that structures come back.
    """
    some = draw(st.lists(st.tuples(COMMON, OWN, FLAGS), min_size=1, max_size=3))
    steps = draw(st.lists(st.tuples(st.sampled_from(some), EVENTS), min_size=2, max_size=5))
    return [(common, own, event, flags) for (common, own, flags), event in steps]


def build(common: Any, own: Any, rank: int, step: int, mesh: DeviceMesh) -> dict[str, Any]:
    def one(spec: Any) -> Any:
        if not isinstance(spec, tuple):
            return spec
        shape, dtype, layout = spec
        full = numbered(*shape, start=step, dtype=dtype)
        if layout == "plain" or (layout == "shard" and not shape):
            return full
        return spread(full, mesh, Shard(0) if layout == "shard" else Replicate())

    state = {name: one(spec) for name, spec in common.items()}
    if own is not None and rank == dist.get_world_size() - 1:
        state["own"] = {"deep": own if not isinstance(own, tuple) else numbered(3, start=step)}
    return {**state, "always": numbered(2, start=step)}


def write(state: dict[str, Any], folder: Path, **options: Any) -> Any:
    writer = dcp.FileSystemWriter(folder, sync_files=False)
    planner = dcp.DefaultSavePlanner(**options)
    return dcp.save(state, storage_writer=writer, planner=planner)


def check_sequence(steps: Any, rank: int, folder: Path, world: Any, mesh: DeviceMesh) -> None:
    for number, (common, own, event, flags) in enumerate(steps):
        state = build(common, own, rank, number, mesh)
        if event == "rank forgets" and rank == 1:
            forget().structures = []
        if event == "coordinator forgets" and rank == 0:
            forget()
        if event == "fails":
            bad = {**state, "always": numbered(2 + rank)}
            with pytest.raises(CheckpointException):
                write(bad, folder / f"bad {number}")
        remembered, fresh = folder / f"a {number}", folder / f"b {number}"
        found = write(state, remembered, **flags)
        expected = write(state, fresh, remember_plans=False, **flags)
        assert content_of(found) == content_of(expected)
        stored = dcp.FileSystemReader(remembered).read_metadata()
        assert content_of(stored) == content_of(dcp.FileSystemReader(fresh).read_metadata())
        if flags.get("flatten_state_dict", True):
            target = blank(state)
            dcp.load(target, checkpoint_id=remembered)
            assert same(target, state)
    world.barrier()
    forget()


@given(steps=sequences())
@settings(max_examples=10, deadline=None)
def test_two_ranks_save_as_if_nothing_were_remembered(
    steps: Any, rank: int, checkpoint_dir: Path, world: Any, device_mesh: DeviceMesh
) -> None:
    check_sequence(steps, rank, checkpoint_dir, world, device_mesh)


@pytest.mark.world_size(4, isolation="module")
@given(steps=sequences())
@settings(max_examples=5, deadline=None)
def test_four_ranks_save_as_if_nothing_were_remembered(
    steps: Any, rank: int, checkpoint_dir: Path, world: Any, device_mesh: DeviceMesh
) -> None:
    check_sequence(steps, rank, checkpoint_dir, world, device_mesh)


# ---- what is sent


def test_values_may_change(checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
    seen = []
    for n in range(3):
        state = {
            "w": spread(numbered(5, 2, start=n), device_mesh, Shard(0)),
            "v": {"step": "x" * n},
        }
        seen.append(messages_of(state, checkpoint_dir / str(n), planner=dcp.DefaultSavePlanner()))
    assert seen == [NEW, KNOWN, KNOWN]


def test_every_change_is_planned_anew(checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
    full = numbered(8, 4)
    states: list[dict[str, Any]] = [
        {"w": full},
        {"w": full.double()},
        {"w": spread(full, device_mesh, Shard(0))},
        {"w": spread(full, device_mesh, Shard(1))},
        {"w": full.reshape(4, 8)},
        {"w": 3},
        {"a": {"b": full}},
        {"a.b": full},
        {"a": [full]},
        {"a": (full,)},
    ]
    for n, state in enumerate(states):
        with watch_messages() as seen:
            dcp.save(state, checkpoint_id=checkpoint_dir / str(n))
        assert seen == NEW, n
        target = blank(state)
        dcp.load(target, checkpoint_id=checkpoint_dir / str(n))
        assert same(target, state), n


def test_a_rank_whose_part_changed_sends_it_alone(checkpoint_dir: Path, rank: int) -> None:
    both = {"w": numbered(3)}
    own = both if rank == 0 else {"w": numbered(3), "own": numbered(2)}
    assert messages_of(both, checkpoint_dir / "0") == NEW
    changed = ["KnownPlan", "CompressedPlan"] if rank == 0 else NEW
    assert messages_of(own, checkpoint_dir / "1") == changed
    assert messages_of(own, checkpoint_dir / "2") == KNOWN


def test_a_coordinator_that_forgot_asks(checkpoint_dir: Path, rank: int) -> None:
    state = {"w": numbered(3)}
    messages_of(state, checkpoint_dir / "0")
    if rank == 0:
        forget()
    first, second = ("NewPlan", "NoneType") if rank == 0 else ("KnownPlan", "NewPlan")
    asked = [first, second, "CompressedPlan"]
    assert messages_of(state, checkpoint_dir / "1") == asked
    assert messages_of(state, checkpoint_dir / "2") == KNOWN


def test_a_rank_that_forgot_sends_its_plan(checkpoint_dir: Path, rank: int) -> None:
    state = {"w": numbered(3)}
    messages_of(state, checkpoint_dir / "0")
    if rank == 1:
        forget()
    assert messages_of(state, checkpoint_dir / "1") == (KNOWN if rank == 0 else NEW)


def test_alternating_structures_are_all_remembered(checkpoint_dir: Path) -> None:
    states: list[dict[str, Any]] = [{"model": numbered(4)}, {"optimizer": numbered(2), "lr": 0.1}]
    for n in range(6):
        seen = messages_of(states[n % 2], checkpoint_dir / str(n))
        assert seen == (NEW if n < 2 else KNOWN)


def test_only_the_latest_structures_are_kept(checkpoint_dir: Path, rank: int) -> None:
    for n in range(plan_memory.STRUCTURES + 2):
        messages_of({f"t{n}": numbered(4)}, checkpoint_dir / str(n))
    memory = plan_memory.memory_of(dist.group.WORLD, 0)  # type: ignore[arg-type] # it is there
    assert len(memory.parts) == plan_memory.STRUCTURES
    assert len(memory.structures) == (plan_memory.STRUCTURES if rank == 0 else 0)


def test_a_structure_that_is_too_large_is_sent_each_time(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_memory, "MEMORY_BYTES", 100)
    for n in range(2):
        assert messages_of({"w": numbered(4)}, checkpoint_dir / str(n)) == NEW


def test_structures_share_a_limit(
    checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = plan_memory.memory_of(dist.group.WORLD, 0)  # type: ignore[arg-type] # it is there
    messages_of({"w": numbered(4)}, checkpoint_dir / "0")
    if rank == 0:
        monkeypatch.setattr(plan_memory, "MEMORY_BYTES", memory.structures[0].nbytes * 3 // 2)
    messages_of({"x": numbered(4)}, checkpoint_dir / "1")
    if rank == 0:
        assert len(memory.structures) == 1
    assert messages_of({"x": numbered(4)}, checkpoint_dir / "2") == KNOWN


# ---- who takes part


def test_a_group_has_its_own_memory(checkpoint_dir: Path) -> None:
    state = {"w": numbered(4)}
    messages_of(state, checkpoint_dir / "0")
    group = dist.new_group()
    assert messages_of(state, checkpoint_dir / "1", process_group=group) == NEW
    assert messages_of(state, checkpoint_dir / "2", process_group=group) == KNOWN
    count = len(plan_memory._memories)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert len(plan_memory._memories) == count - 1


def test_another_coordinator_has_its_own_memory(checkpoint_dir: Path) -> None:
    state = {"w": numbered(4)}
    messages_of(state, checkpoint_dir / "0")
    writer = dcp.FileSystemWriter(checkpoint_dir / "1")
    with watch_messages() as seen, pytest.warns(FutureWarning):
        dcp.save_state_dict(state, writer, coordinator_rank=1)
    assert seen == NEW


def test_options_of_the_planner_count(checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
    state = {str(n): spread(numbered(4), device_mesh, Replicate()) for n in range(4)}
    spread_out = dcp.save(state, checkpoint_id=checkpoint_dir / "0")
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    lowest = dcp.save(state, checkpoint_id=checkpoint_dir / "1", planner=planner)

    def files(metadata: Any) -> set[str]:
        return {info.relative_path.partition("-")[0] for info in metadata.storage_data.values()}

    assert (len(files(spread_out)), len(files(lowest))) == (2, 1)


class Own(dcp.DefaultSavePlanner):
    """A subclass that changes nothing, and may be remembered as far as its messages go."""

    pickles_between_ranks = False


def test_other_planners_are_asked_each_time(checkpoint_dir: Path) -> None:
    called = []
    hooked = dcp.DefaultSavePlanner()
    create = hooked.create_global_plan
    hooked.create_global_plan = lambda plans: called.append(1) or create(plans)  # type: ignore[method-assign,func-returns-value,assignment]
    planners = [Own(), hooked, dcp.DefaultSavePlanner(remember_plans=False)]
    for n, planner in enumerate(planners):
        for again in range(2):
            seen = messages_of({"w": numbered(4)}, checkpoint_dir / f"{n} {again}", planner=planner)
            assert seen[0] == "SavePlan"
    assert len(called) == (2 if dist.get_rank() == 0 else 0)


def test_ranks_may_have_different_planners(checkpoint_dir: Path, rank: int) -> None:
    for n in range(2):
        planner = dcp.DefaultSavePlanner(remember_plans=rank == 0)
        seen = messages_of({"w": numbered(4)}, checkpoint_dir / str(n), planner=planner)
        assert seen == [("NewPlan" if rank == 0 else "SavePlan"), "CompressedPlan"]


@pytest.mark.parametrize("more", [{}, {"t": (1, 2)}], ids=["dicts alone", "with a tuple"])
def test_a_returned_metadata_may_be_changed(more: dict[str, Any], checkpoint_dir: Path) -> None:
    state = {"w": numbered(4), "x": {"y": 1}, **more}
    expected = content_of(dcp.save(state, checkpoint_id=checkpoint_dir / "expected"))
    for n in range(2):
        found = dcp.save(state, checkpoint_id=checkpoint_dir / str(n))
        assert content_of(found) == expected
        found.state_dict_metadata.clear()
        found.planner_data.clear()
    assert messages_of(state, checkpoint_dir / "2") == KNOWN


def test_a_failed_save_changes_nothing(checkpoint_dir: Path, rank: int) -> None:
    state = {"w": numbered(4)}
    messages_of(state, checkpoint_dir / "0")
    with pytest.raises(CheckpointException):
        dcp.save({"w": numbered(4 + rank)}, checkpoint_id=checkpoint_dir / "bad")
    assert messages_of(state, checkpoint_dir / "1") == KNOWN


def test_replicas_are_compared_as_ever(checkpoint_dir: Path, rank: int) -> None:
    messages_of({"w": numbered(4)}, checkpoint_dir / "0", replicas="check")
    with pytest.raises(CheckpointException, match=r"'w' differs first at index \(0,\)"):
        dcp.save(
            {"w": numbered(4, start=rank)}, checkpoint_id=checkpoint_dir / "1", replicas="check"
        )


def test_a_save_in_a_thread_remembers_too(checkpoint_dir: Path) -> None:
    state = {"w": numbered(4)}
    with watch_messages() as seen:
        saves = [dcp.async_save(state, checkpoint_id=checkpoint_dir / str(n)) for n in range(2)]
        for save in saves:
            save.result()  # type: ignore[union-attr] # a future
    assert seen == [*NEW, *KNOWN]
    assert messages_of(state, checkpoint_dir / "2") == KNOWN


# ---- the metadata that ranks get


def test_later_metadata_is_sent_as_a_difference(checkpoint_dir: Path, rank: int) -> None:
    state = {"w": numbered(4), "x": {"y": 1}}
    with watch_answers() as seen:
        for n in range(3):
            found: Any = dcp.save(state, checkpoint_id=checkpoint_dir / str(n))
            stored: Any = dcp.FileSystemReader(checkpoint_dir / str(n)).read_metadata()
            assert dict(found.storage_data) == dict(stored.storage_data)
            assert found.planner_data == stored.planner_data
            assert found.storage_meta.save_id == stored.storage_meta.save_id
            assert content_of(found) == content_of(stored)
            found.storage_data.clear()
            found.planner_data.clear()
    assert seen == ([] if rank == 0 else ["EncodedMetadata", "ChangedMetadata", "ChangedMetadata"])


def test_metadata_of_another_length_is_sent_in_full(checkpoint_dir: Path, rank: int) -> None:
    with watch_answers() as seen:
        for n, thread_count in enumerate((1, 4, 4)):
            writer = dcp.FileSystemWriter(checkpoint_dir / str(n), thread_count=thread_count)
            state = {str(k): numbered(4) for k in range(8)}
            found: Any = dcp.save(state, storage_writer=writer)
            stored: Any = dcp.FileSystemReader(checkpoint_dir / str(n)).read_metadata()
            assert dict(found.storage_data) == dict(stored.storage_data)
    assert seen == ([] if rank == 0 else ["EncodedMetadata", "EncodedMetadata", "ChangedMetadata"])


@pytest.mark.parametrize("forgetful", [0, 1])
def test_metadata_that_one_side_lacks_is_sent_in_full(
    forgetful: int, checkpoint_dir: Path, rank: int
) -> None:
    state = {"w": numbered(4)}
    with watch_answers() as seen:
        for n in range(3):
            if n == 1 and rank == forgetful:
                plan_memory.memory_of(dist.group.WORLD, 0).answers.clear()  # type: ignore[arg-type] # it is there
            messages_of(state, checkpoint_dir / str(n))
    assert seen == ([] if rank == 0 else ["EncodedMetadata", "EncodedMetadata", "ChangedMetadata"])


def test_large_metadata_is_not_remembered(
    checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_memory, "ANSWER_BYTES", 10)
    with watch_answers() as seen:
        for n in range(2):
            messages_of({"w": numbered(4)}, checkpoint_dir / str(n))
    assert seen == ([] if rank == 0 else ["EncodedMetadata"] * 2)
